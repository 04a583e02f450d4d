"""Parses YAML text to plain values with their source locations.

Nothing is executed or interpolated. Of YAML 1.1, only merge keys (`<<: *base`) are supported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from job.errors import Problem, SpecError
from job.spec.core_yaml import TAG, compose, construct, plain, position
from job.spec.foreign_names import quoted
from job.spec.keys import Json, Path, wants_text

MAX_BYTES = 1024 * 1024
MAX_VALUES = 10_000  # with aliases expanded; the largest real spec has about 120
MAX_DEPTH = 24


@dataclass(frozen=True)
class SourceLocation:
    """Where a value was set: a line of the text, or a command line option."""

    line: int | None
    """None for a value from the command line."""
    plain: bool = False
    """Whether the value is an unquoted scalar."""
    option: str | None = None
    """The option that set it, such as `--output`; None for `--set`."""


@dataclass(frozen=True)
class Document:
    """A spec as written."""

    origin: str
    values: dict[str, Any] = field(repr=False)
    locations: Mapping[Path, SourceLocation] = field(repr=False)


def decode(data: bytes, origin: str) -> str:
    """Decodes a spec file. Raises SpecError if it is too large or not UTF-8."""
    if len(data) > MAX_BYTES:
        raise _too_large(origin, len(data))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        raise SpecError(
            position(origin, before, len(before)),
            f"is not UTF-8 text: byte 0x{data[error.start]:02x} is invalid",
            fix="save the file as UTF-8",
        ) from None


def parse(text: str, origin: str) -> Document:
    """Parses one YAML document.

    Raises SpecError if the text is too large, is not valid YAML or a mapping, or repeats a key.
    """
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise _too_large(origin, len(text.encode("utf-8", "replace")))
    root = compose(text, origin)
    if root is None:
        raise SpecError(origin, "is empty", fix="start from a file in specs/")
    reader = _Reader(origin)
    values = reader.read(root, ())
    if reader.problems:
        raise SpecError.from_problems(reader.problems)
    if not isinstance(values, dict):
        line = root.start_mark.line + 1
        raise SpecError(
            f"{origin}:{line}",
            "must be a mapping of keys",
            value=quoted(values),
            fix="start from a file in specs/",
        )
    return Document(origin, values, reader.locations)


def read_value(text: str) -> Json:
    """Parses `text` as one value: a scalar, `[…]` or `{…}`.

    Raises ValueError for an invalid list, mapping or quoted text.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        try:
            root = compose(text, "value")
            reader = _Reader("value")
            value = reader.read(root, ()) if root is not None else None
        except SpecError as error:
            raise ValueError(error.problems[0].message) from None
        if reader.problems:
            raise ValueError(reader.problems[0].message)
        return value
    return plain(text)


def read_at(path: Path, text: str) -> Json:
    """Parses `text` as a value for `path`; `123` stays text if the key accepts only text.

    Raises ValueError if it is not valid YAML, unless the key accepts only text.
    """
    try:
        value = read_value(text)
    except ValueError:
        if wants_text(path):
            return text
        raise
    return text if wants_text(path) and not isinstance(value, str | None) else value


class _Reader:
    """Converts nodes to values and records their locations; limits what aliases expand to."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.locations: dict[Path, SourceLocation] = {}
        self.problems: list[Problem] = []
        self._count = 0

    def read(self, node: yaml.Node, path: Path) -> Json:
        self._count += 1
        if self._count > MAX_VALUES:
            raise SpecError(
                self.origin,
                f"contains more than {MAX_VALUES:,} values with its aliases expanded",
                fix="write the values out, or remove the aliases",
            )
        if len(path) > MAX_DEPTH:  # also ends an alias inside its own anchor
            raise SpecError(
                f"{self.origin}:{node.start_mark.line + 1}",
                f"is nested deeper than {MAX_DEPTH} levels",
            )
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        self.locations.setdefault(path, SourceLocation(node.start_mark.line + 1, plain))
        if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            try:
                return construct(node.tag.removeprefix(TAG), node.value)
            except (KeyError, ValueError):
                pass
        self._problem(node, f"the YAML tag {node.tag.replace(TAG, '!!')} is not supported here")
        return None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Json]:
        merged: dict[str, Json] = {}
        values: dict[str, Json] = {}
        lines: dict[str, int] = {}
        # Merge keys first, so that the mapping's own keys overwrite their locations.
        for key, value in node.value:
            if _is_merge(key):
                merged = {**self._merged(value, path), **merged}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if _is_merge(key):
                continue
            if not isinstance(key, yaml.ScalarNode):
                self._problem(key, "a key must be a scalar")
                continue
            name = key.value
            if name in values:
                self._problem(
                    key,
                    f"the key {quoted(name)} is set twice, first on line {lines[name]}",
                    "remove one of the two",
                )
                continue
            if name in merged:
                self._forget((*path, name))
            lines[name] = line
            values[name] = self.read(value, (*path, name))
            self.locations[(*path, name)] = SourceLocation(
                line, self.locations[(*path, name)].plain
            )
        return {**merged, **values}

    def _merged(self, node: yaml.Node, path: Path) -> dict[str, Json]:
        merged: dict[str, Json] = {}
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            value = self.read(source, path)
            if isinstance(value, dict):
                merged = {**value, **merged}
            else:
                self._problem(source, "`<<` takes a mapping, as in `<<: *name`")
        return merged

    def _forget(self, path: Path) -> None:
        for other in [p for p in self.locations if p[: len(path)] == path]:
            del self.locations[other]

    def _problem(self, node: yaml.Node, message: str, fix: str | None = None) -> None:
        mark = node.start_mark
        self.problems.append(
            Problem(f"{self.origin}:{mark.line + 1}:{mark.column + 1}", message, None, fix)
        )


def _is_merge(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None


def _too_large(origin: str, size: int) -> SpecError:
    return SpecError(
        origin,
        f"is larger than {MAX_BYTES:,} bytes",
        value=f"{size:,} bytes",
        fix="a spec contains settings; store data where data.train.uri points",
    )
