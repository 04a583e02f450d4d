"""Estimates how many records large files hold, from their first bytes."""

import io
from collections.abc import Mapping
from contextlib import suppress
from typing import BinaryIO, cast

from job import storage
from job.errors import DataError
from job.prep.readers import tars, texts
from job.prep.source_files import SourceFile

SAMPLE_BYTES = 8 * 2**20
"""Bytes to read for an estimate, before decompression."""
TEXT_FORMATS = ("jsonl", "json", "csv", "tsv")
ESTIMATED_FORMATS = (*TEXT_FORMATS, "webdataset")
"""Formats whose records can only be counted by reading the whole file."""


def estimate_count(sizes: Mapping[SourceFile, int]) -> int:
    """Estimates the number of records in files of these sizes from the size of the first ones."""
    kinds: dict[tuple[str, bool], dict[SourceFile, int]] = {}
    for file, size in sizes.items():
        kinds.setdefault((file.format, file.uri.lower().endswith("gz")), {})[file] = size
    return sum(map(_estimate, kinds.values()))


def _estimate(sizes: Mapping[SourceFile, int]) -> int:
    """The estimate for files of one format and compression."""
    records = read = 0
    for file, size in sizes.items():
        if file.format in TEXT_FORMATS:
            more_records, more_bytes = _sample_text(file, SAMPLE_BYTES - read)
        else:
            more_records, more_bytes = _sample_archive(file, size, SAMPLE_BYTES - read)
        records, read = records + more_records, read + more_bytes
        if read >= SAMPLE_BYTES:
            break
    return round(records / max(1, read) * sum(sizes.values()))


def _sample_text(file: SourceFile, limit: int) -> tuple[int, int]:
    """The records in the first bytes of a text file, and the number of these bytes."""
    records = 0
    with storage.open_read(file.uri) as stream:
        head = _Head(stream, limit)
        # A record or a compressed block that is cut at the limit is not an error.
        with suppress(DataError, EOFError):
            for _ in texts.read(file, cast(BinaryIO, io.BufferedReader(head))):
                records += 1
    return records, head.bytes_read


def _sample_archive(file: SourceFile, size: int, limit: int) -> tuple[int, int]:
    """The same for an archive; a compressed one is read whole, as its rows have no offsets."""
    records = 0
    for record in tars.webdataset(file):
        if record.offset is not None and record.offset >= limit:
            return records, record.offset
        records += 1
    return records, size


class _Head(io.RawIOBase):
    """The first bytes of a stream, as if it ended there."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._limit, self.bytes_read = stream, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(min(len(buffer), self._limit - self.bytes_read))
        buffer[: len(data)] = data
        self.bytes_read += len(data)
        return len(data)
