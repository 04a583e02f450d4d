"""What an API server drops or rewrites when it stores a manifest: `kubectl diff` would report it.

Servers decode JSON into Go structs and encode them again: an optional field that is empty, null,
false or zero is gone, unless it is a pointer. Quantities come back in one form of several. Defaults
are only added, which is no difference: kubectl compares what a manifest names.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from decimal import Decimal

from job.kubernetes.context import Object
from tests.manifest_lint.resources import FACTORS, QUANTITY, value

EMPTY_OBJECTS = {"emptyDir", "namespaceSelector", "podSelector", "torch"}
"""Pointers to structs: `{}` has a meaning, and stays."""
FALSE_FLAGS = {
    *("allowPrivilegeEscalation", "automountServiceAccountToken", "enableServiceLinks"),
    *("optional", "suspend"),
}
ZEROES = {"backoffLimit", "replicas", "ttlSecondsAfterFinished", "runAsUser", "runAsGroup"}
"""Pointers to flags and numbers, which stay as they are written."""
OF_THE_SERVER = {"creationTimestamp", "generation", "resourceVersion", "status", "uid"}
QUANTITIES = {"sizeLimit", "storage", "memory", "cpu", "ephemeral-storage"}
BINARY = ["", "Ki", "Mi", "Gi", "Ti", "Pi"]
DECIMAL = ["m", "", "k", "M", "G", "T", "P"]


def canonical(quantity: object) -> str:
    """A quantity as servers store it: the largest unit of its kind that leaves a whole number.

    Raises ValueError if it is none.
    """
    amount, found = value(quantity), QUANTITY.fullmatch(str(quantity))
    assert found is not None
    units = BINARY if (found[2] or "").endswith("i") else DECIMAL
    if not amount:
        return "0"
    for unit in reversed(units):
        count = amount / FACTORS[unit]
        if count == count.to_integral():
            return f"{int(count)}{unit}"
    return f"{int((amount / Decimal('0.001')).to_integral())}m"


def is_stored_as_written(documents: Sequence[Object]) -> Iterator[str]:
    for document in documents:
        where = f"{document['kind']}/{document['metadata']['name']}"
        for path, found in _leaves(document, ()):
            if reason := _difference(path, found):
                yield f"{where}: {'.'.join(map(str, path))} {reason}"


def _leaves(found: object, path: tuple[object, ...]) -> Iterator[tuple[tuple[object, ...], object]]:
    """Everything below that has nothing below itself, with its path."""
    if isinstance(found, dict) and found:
        for key, inner in found.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(found, list) and found:
        for index, inner in enumerate(found):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, found


def _difference(path: tuple[object, ...], found: object) -> str | None:
    key = next(part for part in reversed(path) if isinstance(part, str))
    if OF_THE_SERVER & set(path[:2]):
        return "is the server's to set"
    if found is None:
        return "is null, which servers drop"
    if found == [] or (found == {} and key not in EMPTY_OBJECTS):
        return "is empty, and servers drop empty lists and maps"
    if found is False and key not in FALSE_FLAGS:
        return "is false, which servers drop"
    if found == 0 and not isinstance(found, bool) and key not in ZEROES:
        return "is zero, which servers drop"
    if "data" in path[:1]:  # of a ConfigMap: text, kept as it is
        return None
    if key in QUANTITIES or (set(path) & {"limits", "requests"} and re.match(r"\d", str(found))):
        with suppress(ValueError):  # another rule's to report
            if (kept := canonical(found)) != found:
                return f"is {found!r}, which servers store as {kept!r}"
    return None
