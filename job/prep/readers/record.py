"""A record as a source holds it, before it is a row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

MAX_LINE = 64 * 2**20
"""Bytes of the longest line, item or archive member that is read."""


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
            values = json.loads(self.line.decode("utf-8-sig"))
            if not isinstance(values, dict):
                raise ValueError(f"a line must be a JSON object, found {type(values).__name__}")
            if b"\\u" in self.line:  # half of a surrogate pair is JSON, and no text
                json.dumps(values, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            return Record(id=self.id, base=self.base, problem=f"unreadable line: {error}")
        return Record(id=self.id, base=self.base, values=values)


def size_of(value: object) -> int:
    """About how many bytes a value takes."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return 8
