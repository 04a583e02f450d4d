"""Readers of source files, one module for each kind: each gives records, one by one."""

from collections.abc import Iterator
from itertools import islice

from job.prep.discovery import SourceFile
from job.prep.readers import tables, tars, texts
from job.prep.readers.amount import READ_THROUGH, about
from job.prep.readers.record import Record, RecordPosition

__all__ = ["READ_THROUGH", "Record", "RecordPosition", "about", "count", "read"]


def read(file: SourceFile, start: RecordPosition | None = None) -> Iterator[Record]:
    """The file's records in order, from `start` on; memory stays at a few of them.

    Read from a start, ids may count from there. Raises DataError where the file as a whole is not
    what its format says.
    """
    start = start or RecordPosition()
    match file.format:
        case "jsonl":
            return texts.jsonl(file, start.offset or 0)
        case "parquet":
            return tables.parquet(file, start.in_file)
        case "webdataset" if start.offset:
            return tars.webdataset(file, start.offset)
    return islice(_every(file), start.in_file, None)


def _every(file: SourceFile) -> Iterator[Record]:
    match file.format:
        case "json":
            return texts.json_items(file)
        case "csv" | "tsv":
            return texts.delimited(file)
        case "arrow":
            return tables.arrow(file)
        case "webdataset":
            return tars.webdataset(file)
        case "imagefolder":
            return iter([_pair(file)])
    raise AssertionError(f"{file.format} is no format of a file")


def count(file: SourceFile) -> int:
    """How many records `read` will give; without parsing where the format allows it."""
    match file.format:
        case "parquet":
            return tables.parquet_rows(file)
        case "arrow":
            return tables.arrow_rows(file)
        case "imagefolder":
            return 1
    return sum(1 for _ in read(file))


def _pair(file: SourceFile) -> Record:
    if file.text_uri is None:
        return Record(id=file.name, problem="has no text of the same name beside it", base="")
    image, text = file.uri.rpartition("/")[2], file.text_uri.rpartition("/")[2]
    base = file.uri.rpartition("/")[0]
    return Record(id=file.name, values={"image": image}, text_path=text, base=base)
