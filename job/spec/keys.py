"""What the JSON Schema says about each key: the one place that reads the schema file."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path as FilePath
from typing import Any

SCHEMA_FILE = FilePath(__file__).parent / "schema" / "job.v1.json"

Path = tuple[str | int, ...]
"""Where a value stands: `("data", "train", "uri")`; numbers count list items from 0."""
Schema = Mapping[str, Any]

_NAMES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "a mapping of keys",
    "null": "null",
}


@cache
def schema() -> Schema:
    """The JSON Schema of a spec."""
    document: Schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return document


def follow(node: Schema) -> Schema:
    """`node` with the definition that it refers to put in; its own words win."""
    if "$ref" not in node:
        return node
    definition = schema()["$defs"][node["$ref"].removeprefix("#/$defs/")]
    return {**definition, **node}


def at(path: Path) -> Schema | None:
    """What the schema says about the key at `path`; None where it knows no such key."""
    node = schema()
    for part in path:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if inner is None:
            return None
        node = follow(inner)
    return node


def path_of(dotted: str) -> Path:
    """A key as people name it, in its parts: `data.train[0].uri`."""
    path: list[str | int] = []
    for part in dotted.split("."):
        name = re.sub(r"(\[\d{1,4}\])+\Z", "", part)
        path += [name, *map(int, re.findall(r"\d+", part[len(name) :]))]
    return tuple(path)


def nearest_known(path: Path) -> str | None:
    """The dotted key at `path`, or else the nearest above it; None at the top."""
    names = tuple(part for part in path if isinstance(part, str))
    for end in range(len(names), 0, -1):
        if (dotted := ".".join(names[:end])) in dotted_keys():
            return dotted
    return None


def types(node: Schema) -> tuple[str, ...]:
    """The JSON types that a key takes."""
    given = node["type"]
    return (given,) if isinstance(given, str) else tuple(given)


def wants_text(path: Path) -> bool:
    """Whether nothing but text can stand here, so that `123` must mean the text `123`."""
    node = at(path)
    return node is not None and set(types(node)) <= {"string", "null"} and "string" in types(node)


def walk(node: Schema | None = None, path: Path = ()) -> Iterator[tuple[Path, Schema]]:
    """Every key with what the schema says about it, sections before what they hold."""
    for name, inner in (schema() if node is None else node).get("properties", {}).items():
        inner = follow(inner)
        yield (*path, name), inner
        yield from walk(inner, (*path, name))


@cache
def dotted_keys() -> tuple[str, ...]:
    """Every key as people name it: `train.learning_rate`."""
    return tuple(".".join(map(str, path)) for path, _ in walk())


def default(dotted: str) -> Any:
    """The default of a key that has one."""
    node = at(path_of(dotted))
    assert node is not None, f"the schema knows no {dotted}"
    return node["default"]


def since(node: Schema) -> str:
    """The version of the project in which a key came; most came with the first."""
    return str(node.get("since", schema()["since"]))


def describe(node: Schema) -> str:
    """What may stand at a key, to follow `must be`: `a number greater than 0`."""
    if "const" in node:
        return json.dumps(node["const"])
    null = " or null" if "null" in types(node) else ""
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}{null}"
    kinds = [_describe_kind(node, kind) for kind in types(node) if kind != "null"]
    return " or ".join(kinds) + null


def _describe_kind(node: Schema, kind: str) -> str:
    if kind == "array":
        least = "a non-empty list of " if node.get("minItems") else "a list of "
        inner = describe(follow(node["items"])).removeprefix("one of ")
        inner = inner.replace("a mapping", "mappings")
        return f"{least}{inner}"
    if kind == "string" and (only := re.fullmatch(r"\^(\w+)\$", node.get("pattern", ""))):
        return only[1]
    if kind == "string" and "maxLength" in node:
        return f"text of at most {node['maxLength']} characters"
    bounds = [
        f"{words} {node[word]}"
        for word, words in (
            ("minimum", "of at least"),
            ("exclusiveMinimum", "greater than"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "less than"),
        )
        if word in node and kind in ("integer", "number")
    ]
    return " ".join([_NAMES[kind], " and ".join(bounds)]).strip()
