"""The spec reference, generated from the schema as plain text or as a Markdown page."""

import textwrap
from collections.abc import Iterator

from job.errors import UsageError
from job.spec import keys
from job.spec.foreign_names import foreign_name, nearest, quoted, typo

_WIDTH = 92
_RELATIONS = {"requires": "requires", "conflicts": "conflicts with"}

PAGE = """\
# The spec, key by key

Generated from the JSON Schema by `make reference`; `python -m job reference KEY` prints one entry.

Editors complete and check a spec if its first line names the schema:

```yaml
# yaml-language-server: $schema=../job/spec/schema/job.v1.json
```

The path is relative to the spec; `python -m job schema > job.v1.json` writes a copy for specs
elsewhere. VS Code requires the YAML extension by Red Hat, Neovim and others `yaml-language-server`;
in JetBrains editors, add the file under *JSON Schema Mappings*.

[`specs/examples/`](../specs/examples) has a small spec for each feature.

`${NAME}` in a value is replaced by the environment variable, `${NAME,default}` by the default if
the variable is unset or empty; `$${` is a literal `${`. An unquoted value that is a single variable
is parsed as YAML, so `max_steps: ${STEPS,60}` is a number. `spec.resolved.yaml` contains the
values, except that a [secret](03-operations.md#secrets) stays `${NAME}` there; it is always text.
"""


def reference(field: str | None = None) -> str:
    """The reference of all keys, or of the section or key `field` (a dotted key or its last part).

    Raises UsageError if there is no such key.
    """
    entries = list(keys.walk())
    if field is not None:
        wanted = _wanted(field.strip().removeprefix("$."))
        entries = [e for e in entries if any(_within(".".join(map(str, e[0])), w) for w in wanted)]
    return "\n\n".join(
        _entry(".".join(map(str, path)), str(path[-1]), node) for path, node in entries
    )


def page() -> str:
    """The whole reference as Markdown, with a heading for each key."""
    return "\n".join([PAGE, *("\n".join(_heading(path, node)) for path, node in keys.walk())])


def _wanted(field: str) -> list[str]:
    known = keys.dotted_keys()
    if field in known:
        return [field]
    if by_last := [dotted for dotted in known if dotted.rpartition(".")[2] == field]:
        return by_last
    known_name = foreign_name(field.rpartition(".")[2])
    if known_name is not None and known_name.none is not None:
        raise UsageError("FIELD", "is not a key of the spec", value=field, fix=known_name.none)
    close = known_name and (known_name.key or known_name.set)
    close = close or nearest(field, known)
    close = close or typo(field, [dotted.rpartition(".")[2] for dotted in known])
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
    allowed = f"{keys.describe(node)}; {_default(node)}; since {keys.since(node)}"
    for text in (allowed, node["description"]):
        yield from textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False)
    for relation in _RELATIONS:
        for note in node.get(relation, ()):
            yield f"{_RELATIONS[relation]}: {_about(note)}"
    for example in node.get("examples", ()):
        yield f"example: {name}: {quoted(example)}"


def _heading(path: keys.Path, node: keys.Schema) -> Iterator[str]:
    dotted = ".".join(map(str, path))
    yield f"{'##' if len(path) == 1 else '###'} {dotted}\n"
    yield node["description"] + "\n"
    yield f"- takes {keys.describe(node)}"
    yield f"- {_default(node)}"
    for relation in _RELATIONS:
        for note in node.get(relation, ()):
            yield f"- {_RELATIONS[relation]} {_about(note, '`')}"
    for example in node.get("examples", ()):
        yield f"- example: `{path[-1]}: {quoted(example)}`"
    yield f"- since {keys.since(node)}\n"


def _about(note: keys.Schema, tick: str = "") -> str:
    """The other key and its value, or those that each suffice, then the value of this key that the
    relation applies to. Of a note with `any`, the other's value is an example."""
    shown, before = list[str](), None
    for name, _, value in (each.partition(": ") for each in (note["with"], *note.get("or", ()))):
        other = name if note.get("any") else value if name == before else f"{name}: {value}"
        shown.append(f"{tick}{other}{tick}")
        before = name
    when = f", for {tick}{quoted(note['value'])}{tick}" if "value" in note else ""
    return " or ".join(shown) + when


def _default(node: keys.Schema) -> str:
    if "default" not in node:
        return "required"
    return "optional" if node["default"] == {} else f"default {quoted(node['default'])}"
