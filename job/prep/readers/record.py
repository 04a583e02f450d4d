"""A record as a source holds it, before it is a row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

MAX_LINE = 64 * 2**20
"""Bytes of the longest line, item or archive member that is read."""


@dataclass(frozen=True, kw_only=True)
class RecordPosition:
    """Where a record begins in its source, to read on from there."""

    number: int = 0
    """Of the record in the source."""
    file: int = 0
    """Number of the source's file that holds it."""
    in_file: int = 0
    """Records of that file before it."""
    offset: int | None = None
    """Bytes of that file before it; None where the format cannot be entered there."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record of a source: where it came from and what it says."""

    id: str
    base: str
    """The folder that relative image paths are resolved in."""
    values: Mapping[str, object] | None = None
    """None where `line` still has to be parsed, and where nothing can be read."""
    line: bytes | None = None
    """A line of JSON: parsed where it is needed, which may be another process."""
    problem: str | None = None
    """Why nothing can be read."""
    text_path: str | None = None
    """A file, in `base`, that holds the column `text`."""
    offset: int | None = None
    """Bytes of its file before it, where a reader can begin there."""
    place: RecordPosition | None = None
    """Where it is in its source, once that is read as a whole."""
    passed_over: int = 0
    """Members of an archive before its end that are no data, as systems leave them."""

    @property
    def size(self) -> int:
        """About how many bytes it takes, pictures included."""
        return len(self.line) if self.line is not None else size_of(self.values)

    def parsed(self) -> "Record":
        """The record with `values` or `problem`."""
        if self.line is None:
            return self
        try:
            if len(self.line) > MAX_LINE:
                raise ValueError(f"the line has {len(self.line)} bytes, more than {MAX_LINE}")
            values = json.loads(self.line.decode("utf-8-sig"), object_pairs_hook=_once)
            if not isinstance(values, dict):
                raise ValueError(f"a line must be a JSON object, found {type(values).__name__}")
            if b"\\u" in self.line:  # half of a surrogate pair is JSON, and no text
                json.dumps(values, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            return replace(self, line=None, problem=f"unreadable line: {error}")
        return replace(self, line=None, values=values)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON. Raises ValueError if a key stands twice: one value would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"the key `{repeated(pairs)}` stands twice in an object")
    return made


def repeated(pairs: list[tuple[str, object]]) -> str:
    """The first key that an object of JSON has twice."""
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)


def size_of(value: object) -> int:
    """About how many bytes a value takes."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return 8
