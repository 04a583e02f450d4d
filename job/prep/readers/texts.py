"""Lists as text: lines of JSON, a JSON array, values parted by commas or tabs; each also `.gz`."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from job import storage
from job.errors import DataError
from job.prep.find import SourceFile
from job.prep.readers.record import MAX_LINE, Record

_PIECE = 2**20


def read(file: SourceFile, stream: BinaryIO) -> Iterator[Record]:
    """The records in a stream of the file's bytes, which need not be all of them."""
    match file.format:
        case "jsonl":
            return jsonl(file, stream=stream)
        case "json":
            return json_items(file, stream)
    return delimited(file, stream)


def open_text(file: SourceFile, stream: BinaryIO | None = None) -> BinaryIO:
    """The file, or a `stream` of its bytes, unpacked where its name ends in `.gz`."""
    stream = stream or storage.open_read(file.uri)
    if file.uri.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    return stream


def jsonl(file: SourceFile, offset: int = 0, stream: BinaryIO | None = None) -> Iterator[Record]:
    """One record a line, parsed later; a line too long is skipped without being held.

    `offset` is where a line begins, in the bytes of the unpacked file.
    """
    base = storage.parent(file.uri)
    number = 0
    with open_text(file, stream) as stream:
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
    """Rows under a line of names, by RFC 4180; `tsv` parts them by tabs."""
    base = storage.parent(file.uri)
    csv.field_size_limit(MAX_LINE)
    with open_text(file, given) as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.DictReader(lines, delimiter="\t" if file.format == "tsv" else ",")
        number = 0
        while True:
            number += 1
            row_id, problem = f"{file.name}:{number}", None
            try:
                row = next(rows, None)
                if row is None:
                    return
                if None in row:
                    problem = "has more values than there are columns"
                else:
                    "".join(value or "" for value in row.values()).encode()
            except csv.Error as error:
                problem, row = str(error), {}
            except UnicodeEncodeError:
                problem = "is not UTF-8 text"
            if problem:
                yield Record(id=row_id, base=base, problem=f"unreadable row: {problem}")
            else:
                yield Record(id=row_id, base=base, values=row)


def _guarded(file: SourceFile, read: Any, size: int) -> Any:
    try:
        return read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            file.name, f"cannot be read: {error}", fix="check that the file was copied whole"
        ) from error
