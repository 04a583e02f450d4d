"""Lists as text: lines of JSON, a JSON array, values parted by commas or tabs; each also `.gz`."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

from job import storage
from job.errors import DataError
from job.prep.find import SourceFile
from job.prep.readers.record import MAX_LINE, Record

_PIECE = 2**20
_CALLED = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def read(file: SourceFile, stream: BinaryIO) -> Iterator[Record]:
    """The records in a stream of the file's bytes, which need not be all of them."""
    match file.format:
        case "jsonl":
            return jsonl(file, given=stream)
        case "json":
            return json_items(file, stream)
    return delimited(file, stream)


def open_text(file: SourceFile, stream: BinaryIO | None = None) -> BinaryIO:
    """The file, or a `stream` of its bytes, unpacked where its name ends in `.gz`."""
    stream = stream or storage.open_read(file.uri)
    if file.uri.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    return stream


def jsonl(file: SourceFile, offset: int = 0, given: BinaryIO | None = None) -> Iterator[Record]:
    """One record a line, parsed later; a line too long is skipped without being held.

    `offset` is where a line begins, in the bytes of the unpacked file.
    """
    base = storage.parent(file.uri)
    number = 0
    with open_text(file, given) as stream:
        if offset:
            _guarded(file, stream.seek, offset)
        while line := _guarded(file, stream.readline, MAX_LINE + 1):
            number += 1
            row_id, begins = f"{file.name}:{number}", offset
            offset += len(line)
            if len(line) > MAX_LINE and not line.endswith(b"\n"):
                while rest := stream.readline(_PIECE):
                    offset += len(rest)
                    if rest.endswith(b"\n"):
                        break
                problem = f"unreadable line: it has more than {MAX_LINE} bytes"
                yield Record(id=row_id, base=base, problem=problem, offset=begins)
            elif line.strip():
                yield Record(id=row_id, base=base, line=line, offset=begins)


def json_items(file: SourceFile, given: BinaryIO | None = None) -> Iterator[Record]:
    """The items of an array, or of objects one after the other, without holding the whole file."""
    base, decoder = storage.parent(file.uri), json.JSONDecoder()
    with open_text(file, given) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig")
        text, at, number, piece, ended = "", 0, 0, _PIECE, False
        reason: Exception
        while True:
            while at < len(text) and text[at] in " \t\r\n,[]":
                at += 1
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                reason = error
            else:
                number, piece = number + 1, _PIECE
                yield _item(f"{file.name}:{number}", base, value)
                continue
            if ended and at >= len(text):
                return
            if ended or len(text) - at > MAX_LINE:
                raise DataError(
                    file.name,
                    f"is not JSON after item {number}: {reason}",
                    fix="check that the file was copied whole, or set `format`",
                )
            more = _guarded(file, stream.read, piece)
            piece, ended = min(piece * 2, MAX_LINE), not more
            text, at = text[at:] + more, 0


def _item(row_id: str, base: str, value: Any) -> Record:
    if not isinstance(value, dict):
        return Record(
            id=row_id, base=base, problem=f"an item must be an object, found {type(value).__name__}"
        )
    return Record(id=row_id, base=base, line=json.dumps(value).encode())


def delimited(file: SourceFile, given: BinaryIO | None = None) -> Iterator[Record]:
    """Rows under a line of names, by RFC 4180; `tsv` parts them by tabs.

    A quote that is never closed makes the rows behind it part of one value, so it ends the job. A
    value of several lines is refused where tabs part values: there nothing else shows such a quote.
    """
    base, tabs = storage.parent(file.uri), file.format == "tsv"
    csv.field_size_limit(MAX_LINE)
    with open_text(file, given) as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.DictReader(lines, delimiter="\t" if tabs else ",", strict=True)
        number = 0
        while True:
            number += 1
            row_id, problem = f"{file.name}:{number}", None
            first = rows.line_num + 1
            try:
                row = next(rows, None)
                if number == 1:
                    _require_delimiter(file, rows.fieldnames or ())
                if row is None:
                    return
                if None in row:
                    problem = "has more values than there are columns"
                elif tabs and any("\n" in (value or "") for value in row.values()):
                    problem = "a value has several lines; is a quote not closed?"
                else:
                    "".join(value or "" for value in row.values()).encode()
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise DataError(
                        row_id,
                        f"a quote in line {first} is never closed",
                        fix="close it, or write it twice where it is part of the value",
                    ) from error
                problem, row = f"{error} (lines {first} to {rows.line_num})", {}
            except UnicodeEncodeError:
                problem = "is not UTF-8 text"
            if problem:
                yield Record(id=row_id, base=base, problem=f"unreadable row: {problem}")
            else:
                yield Record(id=row_id, base=base, values=row)


def _require_delimiter(file: SourceFile, names: Sequence[str]) -> None:
    """Raises DataError where another character parts the values: all would be one column."""
    own = {"csv": ",", "tsv": "\t"}
    if len(names) != 1 or not (found := re.search(r"[;,\t|]", names[0])):
        return
    other = next((name for name, parts in own.items() if parts == found[0]), None)
    raise DataError(
        file.name,
        f"its names are parted by {_CALLED[found[0]]}, where {file.format} takes "
        f"{_CALLED[own[file.format]]}",
        value=names[0],
        fix=f"set `format: {other}`" if other else "save it with commas between the values",
    )


def _guarded(file: SourceFile, read: Any, size: int) -> Any:
    try:
        return read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            file.name, f"cannot be read: {error}", fix="check that the file was copied whole"
        ) from error
