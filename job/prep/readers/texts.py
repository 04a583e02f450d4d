"""Rows as text: JSON Lines, a JSON array, or comma- or tab-separated values; each also `.gz`."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import BinaryIO, TypeVar, cast

from job import storage
from job.errors import DataError
from job.prep.readers import layout, signatures
from job.prep.readers.record import MAX_LINE, Record, duplicate_key, refuse_deep_nesting
from job.prep.source_files import SourceFile

_READ_BYTES = 2**20

T = TypeVar("T")


def read(file: SourceFile, stream: BinaryIO) -> Iterator[Record]:
    """The records in a stream of the file's bytes, which may end early."""
    match file.format:
        case "jsonl":
            return jsonl(file, head=stream)
        case "json":
            return json_items(file, stream)
    return delimited(file, stream)


def open_text(file: SourceFile, head: BinaryIO | None = None) -> BinaryIO:
    """The file, or a stream of its first bytes, decompressed if its name ends in `.gz`."""
    stream = head or storage.open_read(file.uri)
    if file.uri.lower().endswith(".gz"):
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    if head is None:
        signatures.refuse_mismatch(file, _guarded(file, stream.read, signatures.HEAD_BYTES))
        stream.seek(0)
    return stream


def jsonl(file: SourceFile, offset: int = 0, head: BinaryIO | None = None) -> Iterator[Record]:
    """One record a line, parsed later; a line that is too long is skipped without keeping it.

    `offset` is where a line begins, in the bytes of the decompressed file.
    """
    base = storage.parent(file.uri)
    number = 0
    with open_text(file, head) as stream:
        if offset:
            _guarded(file, stream.seek, offset)
        while line := _guarded(file, stream.readline, MAX_LINE + 1):
            number += 1
            row_id, begin = f"{file.name}:{number}", offset
            if begin == 0 and head is None and len(line) <= MAX_LINE:
                layout.refuse_first_line(row_id, line)
            offset += len(line)
            if len(line) > MAX_LINE and not line.endswith(b"\n"):
                while rest := stream.readline(_READ_BYTES):
                    offset += len(rest)
                    if rest.endswith(b"\n"):
                        break
                problem = f"unreadable line: it has more than {MAX_LINE} bytes"
                yield Record(id=row_id, base=base, problem=problem, offset=begin)
            elif line.strip():
                yield Record(id=row_id, base=base, line=line, offset=begin)


def json_items(file: SourceFile, head: BinaryIO | None = None) -> Iterator[Record]:
    """The items of an array, or of consecutive objects, without loading the whole file."""
    duplicates = list[str]()

    def noting_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            duplicates.append(duplicate_key(pairs))
        return values

    base, decoder = storage.parent(file.uri), json.JSONDecoder(object_pairs_hook=noting_duplicates)
    with open_text(file, head) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig")
        text, at, number, size, ended = "", 0, 0, _READ_BYTES, False
        reason: Exception
        while True:
            while at < len(text) and text[at] in " \t\r\n,[]":
                at += 1
            duplicates.clear()  # an item that needs more text is decoded again
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                reason = error
            else:
                number, size = number + 1, _READ_BYTES
                if number == 1 and not text[at:].strip():
                    layout.refuse_single_object(file.name, value)
                yield _item(f"{file.name}:{number}", base, value, duplicates)
                continue
            if ended and at >= len(text):
                return
            if ended or len(text) - at > MAX_LINE:
                raise DataError(
                    file.name,
                    f"is not JSON after item {number}: {reason}",
                    fix="check that the copy is complete, or set `format`",
                )
            more = _guarded(file, stream.read, size)
            size, ended = min(size * 2, MAX_LINE), not more
            text, at = text[at:] + more, 0


def _item(row_id: str, base: str, value: object, duplicates: Sequence[str]) -> Record:
    problem = None
    if not isinstance(value, dict):
        problem = f"an item must be an object, found {type(value).__name__}"
    elif duplicates:
        problem = f"the key `{duplicates[0]}` appears twice in an object"
    else:
        try:
            refuse_deep_nesting(value)
        except ValueError as error:
            problem = f"unreadable item: {error}"
    if problem:
        return Record(id=row_id, base=base, problem=problem)
    return Record(id=row_id, base=base, line=json.dumps(value).encode())


def delimited(file: SourceFile, head: BinaryIO | None = None) -> Iterator[Record]:
    """Rows under a header, by RFC 4180. The delimiter is a comma, or a tab for `tsv`; if the header
    has none of these, its most frequent other delimiter.

    An unclosed quote turns all further rows into one value, so it is an error. With tabs, a value
    of several lines is refused: nothing else reveals such a quote.
    """
    base = storage.parent(file.uri)
    csv.field_size_limit(MAX_LINE)
    with open_text(file, head) as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        header = _guarded(file, lines.readline, MAX_LINE)
        delimiter = layout.delimiter_of(header, file.format)
        spaced = header.count(f"{delimiter} ") == header.count(delimiter)
        rows = csv.DictReader(
            chain([header], lines),
            delimiter=delimiter,
            skipinitialspace=spaced,  # `image, text`
            strict=True,
        )
        number = 0
        while True:
            number += 1
            row_id, first = f"{file.name}:{number}", rows.line_num + 1
            row: Mapping[str, str] | None = {}
            try:
                if number == 1 and rows.fieldnames is not None:
                    rows.fieldnames = layout.column_names(file.name, rows.fieldnames)
                row = next(rows, None)
                if row is None:
                    return
                problem = _row_problem(row, delimiter, rows.line_num)
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise DataError(
                        row_id,
                        f"a quote in line {first} is never closed",
                        fix="close it, or double it if it is part of the value",
                    ) from error
                problem = f"{error} (lines {first} to {rows.line_num})"
            if problem:
                yield Record(id=row_id, base=base, problem=f"unreadable row: {problem}")
            else:
                yield Record(id=row_id, base=base, values=row)


def _row_problem(row: Mapping[str, str], delimiter: str, line: int) -> str | None:
    """Why a row cannot be used; `line` is its last one."""
    if None in row:
        return "has more values than there are columns"
    if delimiter == "\t" and any("\n" in (value or "") for value in row.values()):
        return "a value has several lines; is a quote not closed?"
    try:
        "".join(value or "" for value in row.values()).encode()
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) & 0xFF
        return f"line {line} is not UTF-8 text (byte 0x{byte:02x})"
    return None


def _guarded(file: SourceFile, read: Callable[[int], T], size: int) -> T:
    try:
        return read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(
            file.name, f"cannot be read: {error}", fix="check that the copy is complete"
        ) from error
