"""Overlays as the differences between two renderings, so that no value is written twice."""

from collections.abc import Iterator, Sequence
from typing import Any

from job.kubernetes.context import Object

Operation = dict[str, Any]


def between(before: Sequence[Object], after: Sequence[Object]) -> list[Object]:
    """The `patches` of a kustomization that turn one rendering into the other.

    Both hold the same objects, in the same order.
    """
    found = []
    for old, new in zip(before, after, strict=True):
        operations = list(_operations(old, new, ""))
        if operations:
            found.append({"target": _target(old), "patch": operations})
    return found


def _target(document: Object) -> Object:
    group, _, version = document["apiVersion"].rpartition("/")
    target = {"version": version, "kind": document["kind"]}
    return {"group": group, **target} if group else target


def _operations(old: Any, new: Any, path: str) -> Iterator[Operation]:
    """RFC 6902 operations; what was appended to a list is added, any other list is replaced."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            place = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in new:
                yield {"op": "remove", "path": place}
            elif key not in old:
                yield {"op": "add", "path": place, "value": new[key]}
            else:
                yield from _operations(old[key], new[key], place)
    elif isinstance(old, list) and isinstance(new, list) and len(old) <= len(new):
        for index, item in enumerate(old):
            yield from _operations(item, new[index], f"{path}/{index}")
        for item in new[len(old) :]:
            yield {"op": "add", "path": f"{path}/-", "value": item}
    else:
        yield {"op": "replace", "path": path, "value": new}
