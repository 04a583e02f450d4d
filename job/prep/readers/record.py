"""A record as stored in its source, before conversion to a row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

MAX_LINE = 64 * 2**20
"""Bytes of the longest line, item or archive member that is read."""
MAX_DEPTH = 100
"""Levels of the most deeply nested value that is read: what reads rows calls itself at each."""


@dataclass(frozen=True, kw_only=True)
class RecordPosition:
    """Where a record begins in its source, to resume reading there.

    The field names are keys in `chunks.jsonl`.
    """

    number: int = 0
    """Index of the record in the source."""
    file: int = 0
    """Index of its file in the source."""
    in_file: int = 0
    """Records before it in that file."""
    offset: int | None = None
    """Bytes before it in that file; None if the format has no entry points."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record of a source: where it came from, and its values."""

    id: str
    base: str
    """The folder of relative image paths."""
    values: Mapping[str, object] | None = None
    """None if `line` is not parsed yet, or if the record is unreadable."""
    line: bytes | None = None
    """A line of JSON; parsed where it is needed, perhaps in another process."""
    problem: str | None = None
    """Why the record is unreadable."""
    text_path: str | None = None
    """A file in `base` with the value of the column `text`."""
    offset: int | None = None
    """Bytes before it in its file, if the reader can start there."""
    position: RecordPosition | None = None
    """Set when the source is read as a whole."""
    junk_members: int = 0
    """Archive members skipped as junk of operating systems and tools."""

    @property
    def size(self) -> int:
        """Approximate bytes, images included."""
        return len(self.line) if self.line is not None else size_of(self.values)

    def parsed(self) -> "Record":
        """The record with `values` or `problem`."""
        if self.line is None:
            return self
        try:
            if len(self.line) > MAX_LINE:
                raise ValueError(f"the line has {len(self.line)} bytes, more than {MAX_LINE}")
            values = json.loads(self.line.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
            if not isinstance(values, dict):
                raise ValueError(f"a line must be a JSON object, found {type(values).__name__}")
            refuse_deep_nesting(values)
            if b"\\u" in self.line:  # half a surrogate pair is valid JSON but not text
                json.dumps(values, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            return replace(self, line=None, problem=f"unreadable line: {error}")
        return replace(self, line=None, values=values)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Raises ValueError for a duplicate key: one of its values would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"the key `{duplicate_key(pairs)}` appears twice in an object")
    return values


def duplicate_key(pairs: list[tuple[str, object]]) -> str:
    """The first key that appears twice in a JSON object."""
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)


def refuse_deep_nesting(value: object) -> None:
    """Raises ValueError if lists and objects are nested more than `MAX_DEPTH` deep."""
    level, depth = [value], 0
    while level:
        level = [
            below
            for each in level
            if isinstance(each, dict | list)
            for below in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"values are nested more than {MAX_DEPTH} deep")


def size_of(value: object) -> int:
    """Approximate bytes of a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return 8
