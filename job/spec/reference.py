"""The spec reference as plain text, made from the schema."""

import textwrap
from collections.abc import Iterator

from job.errors import UsageError
from job.spec import keys
from job.spec.names import ALIASES, nearest, quoted

_WIDTH = 92


def reference(field: str | None = None) -> str:
    """What a spec may say: all of it, one section, or one key, by dotted or last name.

    Raises UsageError for a field that there is none of.
    """
    entries = list(keys.walk())
    if field is not None:
        wanted = _wanted(field.strip().removeprefix("$."))
        entries = [e for e in entries if any(_within(".".join(map(str, e[0])), w) for w in wanted)]
    return "\n\n".join(
        _entry(".".join(map(str, path)), str(path[-1]), node) for path, node in entries
    )


def _wanted(field: str) -> list[str]:
    known = keys.dotted_keys()
    if field in known:
        return [field]
    if by_last := [dotted for dotted in known if dotted.rpartition(".")[2] == field]:
        return by_last
    close = ALIASES.get(field) or nearest(field, known)
    close = close or nearest(field, [dotted.rpartition(".")[2] for dotted in known])
    raise UsageError(
        "FIELD",
        "is not a key of the spec",
        value=field,
        fix=f"try {close}" if close else f"try one of {', '.join(keys.schema()['properties'])}",
    )


def _within(dotted: str, wanted: str) -> bool:
    return dotted == wanted or dotted.startswith(f"{wanted}.")


def _entry(dotted: str, name: str, node: keys.Schema) -> str:
    return "\n".join([dotted, *(f"    {line}" for line in _lines(name, node))])


def _lines(name: str, node: keys.Schema) -> Iterator[str]:
    for text in (_allowed(node), node["description"]):
        yield from textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False)
    for example in node.get("examples", ()):
        yield f"example: {name}: {quoted(example)}"


def _allowed(node: keys.Schema) -> str:
    if "default" not in node:
        default = "required"
    elif node["default"] == {}:
        default = "optional"
    else:
        default = f"default {quoted(node['default'])}"
    return f"{keys.describe(node)}; {default}"
