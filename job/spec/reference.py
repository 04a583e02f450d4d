"""The spec reference, made from the schema: as plain text, and as the page of the documentation."""

import textwrap
from collections.abc import Iterator

from job.errors import UsageError
from job.spec import keys
from job.spec.foreign_names import nearest, quoted, typo, word

_WIDTH = 92
_WORDS = {"requires": "requires", "conflicts": "conflicts with"}

PAGE = """\
# The spec, key by key

Made from the JSON Schema by `make reference`; `python -m job reference KEY` prints one entry.

Editors complete and check a spec by the schema where its first line names it:

```yaml
# yaml-language-server: $schema=../job/spec/schema/job.v1.json
```

The path starts from the spec's folder; `python -m job schema > job.v1.json` writes a copy for specs
that live elsewhere. VS Code needs the extension YAML by Red Hat, Neovim and others
`yaml-language-server`; JetBrains' editors take the file under *JSON Schema Mappings*.

A small spec for each feature is in [`specs/examples/`](../specs/examples).

`${NAME}` in any value stands for the variable of the environment, `${NAME,default}` for the
default where that is unset or empty, `$${` for the characters themselves. Alone and without quotes
it is read as YAML, so `max_steps: ${STEPS,60}` is a number. Numbers, words, sentences, paths and
URIs are written into `spec.resolved.yaml` as they are; a [secret](03-operations.md#secrets) stays
text, and stays `${NAME}` there.
"""


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


def page() -> str:
    """All of it as Markdown: a chapter for each top-level key, a heading for each key below."""
    return "\n".join([PAGE, *("\n".join(_heading(path, node)) for path, node in keys.walk())])


def _wanted(field: str) -> list[str]:
    known = keys.dotted_keys()
    if field in known:
        return [field]
    if by_last := [dotted for dotted in known if dotted.rpartition(".")[2] == field]:
        return by_last
    told = word(field.rpartition(".")[2])
    if told is not None and told.none is not None:
        raise UsageError("FIELD", "is not a key of the spec", value=field, fix=told.none)
    close = told and (told.key or told.set)
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
    for relation in _WORDS:
        for note in node.get(relation, ()):
            yield f"{_WORDS[relation]}: {_about(note)}"
    for example in node.get("examples", ()):
        yield f"example: {name}: {quoted(example)}"


def _heading(path: keys.Path, node: keys.Schema) -> Iterator[str]:
    dotted = ".".join(map(str, path))
    yield f"{'##' if len(path) == 1 else '###'} {dotted}\n"
    yield node["description"] + "\n"
    yield f"- takes {keys.describe(node)}"
    yield f"- {_default(node)}"
    for relation in _WORDS:
        for note in node.get(relation, ()):
            yield f"- {_WORDS[relation]} {_about(note, '`')}"
    for example in node.get("examples", ()):
        yield f"- example: `{path[-1]}: {quoted(example)}`"
    yield f"- since {keys.since(node)}\n"


def _about(note: keys.Schema, tick: str = "") -> str:
    """The other key with its value, and for which value of this one that holds."""
    when = f", for {tick}{quoted(note['value'])}{tick}" if "value" in note else ""
    return f"{tick}{note['with']}{tick}{when}"


def _default(node: keys.Schema) -> str:
    if "default" not in node:
        return "required"
    return "optional" if node["default"] == {} else f"default {quoted(node['default'])}"
