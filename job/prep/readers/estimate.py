"""About how many records large files hold: from the first of them and the bytes that these take."""

import io
from collections.abc import Mapping
from contextlib import suppress
from typing import BinaryIO, cast

from job import storage
from job.errors import DataError
from job.prep.discovery import SourceFile
from job.prep.readers import tars, texts

SAMPLE = 8 * 2**20
"""Bytes of files, as they are stored, that are looked at."""
TEXTS = ("jsonl", "json", "csv", "tsv")
READ_THROUGH = (*TEXTS, "webdataset")
"""Formats whose records can be counted only by reading all of a file."""


def about(files: Mapping[SourceFile, int]) -> int:
    """Records of files of these formats and sizes, about as many a byte as the first have."""
    kinds: dict[tuple[str, bool], dict[SourceFile, int]] = {}
    for file, size in files.items():
        kinds.setdefault((file.format, file.uri.lower().endswith("gz")), {})[file] = size
    return sum(map(_about, kinds.values()))


def _about(alike: Mapping[SourceFile, int]) -> int:
    records = seen = 0
    for file, size in alike.items():
        if file.format in TEXTS:
            found, taken = _first_texts(file, SAMPLE - seen)
        else:
            found, taken = _first_members(file, size, SAMPLE - seen)
        records, seen = records + found, seen + taken
        if seen >= SAMPLE:
            break
    return round(records / max(1, seen) * sum(alike.values()))


def _first_texts(file: SourceFile, most: int) -> tuple[int, int]:
    """The records in the first bytes of a list, and how many bytes these are."""
    records = 0
    with storage.open_read(file.uri) as stream:
        head = _Head(stream, most)
        # What is cut in the middle of a record, or of a packed block, is no defect of the file.
        with suppress(DataError, EOFError):
            for _ in texts.read(file, cast(BinaryIO, io.BufferedReader(head))):
                records += 1
    return records, head.given


def _first_members(file: SourceFile, size: int, most: int) -> tuple[int, int]:
    """The same of an archive; one that is compressed does not tell where its rows begin."""
    records = 0
    for record in tars.webdataset(file):
        if record.offset is not None and record.offset >= most:
            return records, record.offset
        records += 1
    return records, size


class _Head(io.RawIOBase):
    """The first bytes of a stream as if they were all."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self._stream, self._most, self.given = stream, most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(min(len(buffer), self._most - self.given))
        buffer[: len(data)] = data
        self.given += len(data)
        return len(data)
