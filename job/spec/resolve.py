"""Fills in a spec's defaults, and builds the frozen dataclasses of `types` from it."""

import copy
import dataclasses
import types
from collections.abc import Iterator
from typing import TypeVar, cast, get_args, get_origin, get_type_hints

from job.spec import keys
from job.spec.keys import Json, Path, Schema
from job.spec.types import JobSpec

T = TypeVar("T")


def fill(values: T) -> T:
    """Adds the defaults to the `values` of a spec, and converts numbers to the schema's types.

    Drops unknown keys, and keeps values of the wrong type, so that the rules can check an invalid
    spec too.
    """
    return cast(T, _fill(cast(Json, values), keys.schema()))


def _fill(values: Json, node: Schema) -> Json:
    if "properties" in node and isinstance(values, dict):
        filled: dict[str, Json] = {}
        for name, inner in node["properties"].items():
            inner = keys.follow(inner)
            if name in values or "default" in inner:
                value = values[name] if name in values else copy.deepcopy(inner["default"])
                filled[name] = _fill(value, inner)
        return filled
    if "properties" in node and "items" in node and isinstance(values, list):
        return [_fill(value, keys.follow(node["items"])) for value in values]
    if (inner := keys.values_of(node)) is not None and isinstance(values, dict):
        return {name: _fill(value, inner) for name, value in values.items()}
    kinds = keys.types(node)
    if isinstance(values, float) and "integer" in kinds and values.is_integer():
        return int(values)
    if isinstance(values, int) and not isinstance(values, bool) and "number" in kinds:
        return float(values)
    return values


def build(values: Json) -> JobSpec:
    """Builds the dataclasses from valid, complete values."""
    spec = _build(JobSpec, values)
    assert isinstance(spec, JobSpec)
    return spec


def changed(values: dict[str, Json], node: Schema | None = None, path: Path = ()) -> Iterator[str]:
    """Yields the dotted keys whose values differ from the default, or that have no default."""
    node = keys.schema() if node is None else node
    for name, value in values.items():
        inner = keys.follow(node["properties"][name])
        if "properties" in inner and isinstance(value, dict):
            yield from changed(value, inner, (*path, name))
        elif "properties" in inner and isinstance(value, list):
            for index, item in enumerate(value):
                yield from changed(cast(dict[str, Json], item), inner, (*path, f"{name}[{index}]"))
        elif "default" not in inner or value != inner["default"]:
            yield ".".join(map(str, (*path, name)))


def _build(kind: object, value: Json) -> object:
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        built = {name: _build(hints[name], inner) for name, inner in value.items()}
        return kind(**built)  # type: ignore[operator]
    if get_origin(kind) is tuple and dataclasses.is_dataclass(inner := get_args(kind)[0]):
        return tuple(
            _build(inner, item) for item in (value if isinstance(value, list) else [value])
        )
    if isinstance(value, list):
        return tuple(value)
    if get_origin(kind) is tuple and isinstance(value, dict):
        return tuple(value.items())
    if isinstance(value, dict) and get_origin(kind) is types.UnionType:
        return _build(next(k for k in get_args(kind) if dataclasses.is_dataclass(k)), value)
    return value
