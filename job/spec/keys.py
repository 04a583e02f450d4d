"""Looks up keys in the JSON Schema; no other module reads the schema file."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path as FilePath
from typing import Any, Union

SCHEMA_FILE = FilePath(__file__).parent / "schema" / "job.v1.json"

Json = Union[None, bool, int, float, str, list["Json"], dict[str, "Json"]]  # noqa: UP007 - recursive
"""Any value in a spec."""
Path = tuple[str | int, ...]
"""The path to a value: `("data", "train", "uri")`; integers are list indices."""
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
    """`node` with its `$ref` resolved: its own entries override those of the definition."""
    if "$ref" not in node:
        return node
    definition = schema()["$defs"][node["$ref"].removeprefix("#/$defs/")]
    return {**definition, **node}


def at(path: Path) -> Schema | None:
    """The schema of the key at `path`; None if there is no such key."""
    node = schema()
    for part in path:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        inner = inner or values_of(node)
        if inner is None:
            return None
        node = follow(inner)
    return node


def values_of(node: Schema) -> Schema | None:
    """The schema of the values of a mapping with free keys; None for other nodes."""
    inner = node.get("additionalProperties")
    return inner if isinstance(inner, Mapping) else None


def path_of(dotted: str) -> Path:
    """Parses a dotted key such as `data.train[0].uri` to a path."""
    path: list[str | int] = []
    for part in dotted.split("."):
        name = re.sub(r"(\[\d{1,4}\])+\Z", "", part)
        path += [name, *map(int, re.findall(r"\d+", part[len(name) :]))]
    return tuple(path)


def nearest_known(path: Path) -> str | None:
    """The dotted key of `path`, or of its nearest ancestor in the schema; None if there is none."""
    names = tuple(part for part in path if isinstance(part, str))
    for end in range(len(names), 0, -1):
        if (dotted := ".".join(names[:end])) in dotted_keys():
            return dotted
    return None


def types(node: Schema) -> tuple[str, ...]:
    """The JSON types that a key accepts."""
    given = node["type"]
    return (given,) if isinstance(given, str) else tuple(given)


def wants_text(path: Path) -> bool:
    """Whether the key accepts only text (or null), so that `123` is read as the text `123`."""
    node = at(path)
    return node is not None and set(types(node)) <= {"string", "null"} and "string" in types(node)


def walk(node: Schema | None = None, path: Path = ()) -> Iterator[tuple[Path, Schema]]:
    """Yields every key with its schema, each section before its keys."""
    for name, inner in (schema() if node is None else node).get("properties", {}).items():
        inner = follow(inner)
        yield (*path, name), inner
        yield from walk(inner, (*path, name))


@cache
def dotted_keys() -> tuple[str, ...]:
    """All keys in dotted form: `train.learning_rate`."""
    return tuple(".".join(map(str, path)) for path, _ in walk())


def default(dotted: str) -> Json:
    """The default of an optional key."""
    node = at(path_of(dotted))
    assert node is not None, f"the schema has no {dotted}"
    return node["default"]


def since(node: Schema) -> str:
    """The version of the project that added a key, by default the first."""
    return str(node.get("since", schema()["since"]))


def describe(node: Schema) -> str:
    """Describes the valid values of a key, to follow `must be`: `a number greater than 0`."""
    if "const" in node:
        return json.dumps(node["const"])
    null = " or null" if "null" in types(node) else ""
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}{null}"
    kinds = [_describe_kind(node, kind) for kind in types(node) if kind != "null"]
    return (" or ".join(kinds) + null).replace("true or false or", "true, false or")


def _describe_kind(node: Schema, kind: str) -> str:
    if kind == "array":
        least = "a non-empty list of " if node.get("minItems") else "a list of "
        inner = describe(follow(node["items"])).removeprefix("one of ")
        inner = inner.replace("a mapping", "mappings").replace("a whole number", "whole numbers")
        return f"{least}{inner}"
    if kind == "object" and (inner_node := values_of(node)) is not None:
        return f"a mapping from text to {describe(inner_node)}"
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
