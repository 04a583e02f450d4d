"""Readers of source files, one module for each kind of format; each yields records."""

from collections.abc import Iterator
from itertools import islice

from job.prep.readers import tables, tars, texts
from job.prep.readers.estimate import ESTIMATED_FORMATS, estimate_count
from job.prep.readers.record import Record, RecordPosition
from job.prep.source_files import SourceFile

__all__ = ["ESTIMATED_FORMATS", "Record", "RecordPosition", "count", "estimate_count", "read"]


def read(file: SourceFile, start: RecordPosition | None = None) -> Iterator[Record]:
    """The file's records in order, from `start` on, with only a few in memory.

    With a start, ids may count from there. Raises DataError if the file as a whole does not match
    its format.
    """
    start = start or RecordPosition()
    match file.format:
        case "jsonl":
            return texts.jsonl(file, start.offset or 0)
        case "parquet":
            return tables.parquet(file, start.in_file)
        case "webdataset" if start.offset:
            return tars.webdataset(file, start.offset)
    return islice(_read_all(file), start.in_file, None)


def _read_all(file: SourceFile) -> Iterator[Record]:
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
            return iter([_image_and_text(file)])
    raise AssertionError(f"no reader for {file.format}")


def count(file: SourceFile) -> int:
    """How many records `read` yields; from metadata if the format has it."""
    match file.format:
        case "parquet":
            return tables.parquet_rows(file)
        case "arrow":
            return tables.arrow_rows(file)
        case "imagefolder":
            return 1
    return sum(1 for _ in read(file))


def _image_and_text(file: SourceFile) -> Record:
    if file.problem is not None:
        return Record(id=file.name, problem=file.problem, base="")
    if file.text_uri is None:
        return Record(id=file.name, problem="has no text file of the same name", base="")
    image, text = file.uri.rpartition("/")[2], file.text_uri.rpartition("/")[2]
    base = file.uri.rpartition("/")[0]
    return Record(id=file.name, values={"image": image}, text_path=text, base=base)
