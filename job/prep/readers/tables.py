"""Tables read with pyarrow: parquet, Arrow streams, and Arrow files as `save_to_disk` writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from job import storage
from job.errors import DataError
from job.prep.readers import signatures
from job.prep.readers.record import Record
from job.prep.source_files import SourceFile

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

_BATCH_ROWS = 64  # converted at once; they may contain images


def parquet(file: SourceFile, skip: int = 0) -> Iterator[Record]:
    """The rows after the first `skip`; row groups with only skipped rows are not read."""
    with _readable(file):
        table = _open_parquet(file)
        group = first = 0
        while group < table.num_row_groups and first + _group_rows(table, group) <= skip:
            first += _group_rows(table, group)
            group += 1
        groups = range(group, table.num_row_groups)
        batches = table.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups)
        yield from islice(_records(file, batches, first), skip - first, None)


def parquet_rows(file: SourceFile) -> int:
    with _readable(file):
        return int(_open_parquet(file).metadata.num_rows)


def arrow(file: SourceFile) -> Iterator[Record]:
    with _readable(file):
        yield from _records(file, _arrow_batches(file))


def arrow_rows(file: SourceFile) -> int:
    """Of a local file, only the headers of its batches are read."""
    with _readable(file):
        return sum(map(len, _arrow_batches(file)))


def _arrow_batches(file: SourceFile) -> "Iterator[pa.RecordBatch]":
    import pyarrow as pa

    source = (
        pa.memory_map(str(storage.local_path(file.uri)))
        if storage.is_local(file.uri)
        else pa.PythonFile(storage.open_read(file.uri), mode="r")
    )
    with source:
        if source.read(6) == b"ARROW1":
            whole = pa.ipc.open_file(source)
            batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from batches


def _records(
    file: SourceFile, batches: "Iterator[pa.RecordBatch]", number: int = 0
) -> Iterator[Record]:
    """The batches' rows; `number` is that of the first."""
    base = storage.parent(file.uri)
    for batch in batches:
        for start in range(0, len(batch), _BATCH_ROWS):
            for values in batch.slice(start, _BATCH_ROWS).to_pylist():
                yield Record(id=f"{file.name}:{number}", base=base, values=values)
                number += 1


def _group_rows(table: "ParquetFile", group: int) -> int:
    return int(table.metadata.row_group(group).num_rows)


def _open_parquet(file: SourceFile) -> "ParquetFile":
    import pyarrow.parquet

    local = storage.is_local(file.uri)
    source = storage.local_path(file.uri) if local else storage.open_read(file.uri)
    # Read column chunks by the megabyte: a row group of images can be larger than the memory.
    return pyarrow.parquet.ParquetFile(source, buffer_size=2**20, pre_buffer=False)


@contextmanager
def _readable(file: SourceFile) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        signatures.refuse_unreadable(file)
        raise DataError(
            file.name,
            f"is not a readable {file.format} file: {error}",
            fix="check that the copy is complete and `format` is right",
        ) from error
