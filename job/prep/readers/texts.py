"""Lists as text: lines of JSON, a JSON array, values parted by commas or tabs; each also `.gz`."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO, cast

from job import storage
from job.errors import DataError
from job.prep.discovery import SourceFile
from job.prep.readers import contents, shapes
from job.prep.readers.record import MAX_LINE, Record, repeated

_PIECE = 2**20


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
    whole = stream is None
    stream = stream or storage.open_read(file.uri)
    if file.uri.lower().endswith(".gz"):
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if whole:
        contents.refuse(file, _guarded(file, stream.read, contents.LOOKED_AT))
        stream.seek(0)
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
            if begins == 0 and given is None and len(line) <= MAX_LINE:
                shapes.refuse_first_line(row_id, line)
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
    twice = list[str]()

    def noted(pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice.append(repeated(pairs))
        return made

    base, decoder = storage.parent(file.uri), json.JSONDecoder(object_pairs_hook=noted)
    with open_text(file, given) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig")
        text, at, number, piece, ended = "", 0, 0, _PIECE, False
        reason: Exception
        while True:
            while at < len(text) and text[at] in " \t\r\n,[]":
                at += 1
            twice.clear()  # an item that is read on is decoded anew
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                reason = error
            else:
                number, piece = number + 1, _PIECE
                if number == 1 and not text[at:].strip():
                    shapes.refuse_one_object(file.name, value)
                yield _item(f"{file.name}:{number}", base, value, twice)
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


def _item(row_id: str, base: str, value: Any, twice: Sequence[str]) -> Record:
    problem = None
    if not isinstance(value, dict):
        problem = f"an item must be an object, found {type(value).__name__}"
    elif twice:
        problem = f"the key `{twice[0]}` stands twice in an object"
    if problem:
        return Record(id=row_id, base=base, problem=problem)
    return Record(id=row_id, base=base, line=json.dumps(value).encode())


def delimited(file: SourceFile, given: BinaryIO | None = None) -> Iterator[Record]:
    """Rows under a line of names, by RFC 4180. Where the first line has not the format's own
    delimiter, commas or for `tsv` tabs, it is the one that this line has.

    A quote that is never closed makes the rows behind it part of one value, so it ends the job. A
    value of several lines is refused where tabs part values: there nothing else shows such a quote.
    """
    base = storage.parent(file.uri)
    csv.field_size_limit(MAX_LINE)
    with open_text(file, given) as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        first_line = _guarded(file, lines.readline, MAX_LINE)
        delimiter = shapes.delimiter_of(first_line, file.format)
        spaced = first_line.count(f"{delimiter} ") == first_line.count(delimiter)
        rows = csv.DictReader(
            chain([first_line], lines),
            delimiter=delimiter,
            skipinitialspace=spaced,  # `image, text`
            strict=True,
        )
        number = 0
        while True:
            number += 1
            row_id, problem = f"{file.name}:{number}", None
            first = rows.line_num + 1
            try:
                if number == 1 and rows.fieldnames is not None:
                    rows.fieldnames = shapes.names_of(file.name, rows.fieldnames)
                row = next(rows, None)
                if row is None:
                    return
                if None in row:
                    problem = "has more values than there are columns"
                elif delimiter == "\t" and any("\n" in (value or "") for value in row.values()):
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
            except UnicodeEncodeError as error:
                byte = ord(error.object[error.start]) & 0xFF
                problem = f"line {rows.line_num} is not UTF-8 text, by its byte 0x{byte:02x}"
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
