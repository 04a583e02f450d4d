"""Tables by pyarrow: parquet, and Arrow streams and files, which `save_to_disk` writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from job import storage
from job.errors import DataError
from job.prep.discovery import SourceFile
from job.prep.readers import contents
from job.prep.readers.record import Record

_ROWS = 64  # converted together: pictures may lie in them


def parquet(file: SourceFile, skipped: int = 0) -> Iterator[Record]:
    """The rows after the first `skipped`; row groups that hold none of them are not read."""
    with _readable(file):
        table = _parquet(file)
        group = first = 0
        while group < table.num_row_groups and first + _rows_in(table, group) <= skipped:
            first += _rows_in(table, group)
            group += 1
        groups = range(group, table.num_row_groups)
        batches = table.iter_batches(batch_size=_ROWS, row_groups=groups)
        yield from islice(_records(file, batches, first), skipped - first, None)


def parquet_rows(file: SourceFile) -> int:
    with _readable(file):
        return int(_parquet(file).metadata.num_rows)


def arrow(file: SourceFile) -> Iterator[Record]:
    with _readable(file):
        yield from _records(file, _arrow(file))


def arrow_rows(file: SourceFile) -> int:
    """Of a file on this machine only the headers of its batches are looked at."""
    with _readable(file):
        return sum(map(len, _arrow(file)))


def _arrow(file: SourceFile) -> Iterator[Any]:
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


def _records(file: SourceFile, batches: Iterator[Any], number: int = 0) -> Iterator[Record]:
    """The batches' rows; `number` is that of the first."""
    base = storage.parent(file.uri)
    for batch in batches:
        for start in range(0, len(batch), _ROWS):
            for values in batch.slice(start, _ROWS).to_pylist():
                yield Record(id=f"{file.name}:{number}", base=base, values=values)
                number += 1


def _rows_in(table: Any, group: int) -> int:
    return int(table.metadata.row_group(group).num_rows)


def _parquet(file: SourceFile) -> Any:
    import pyarrow.parquet

    source: Any = (
        storage.local_path(file.uri) if storage.is_local(file.uri) else storage.open_read(file.uri)
    )
    # Read column chunks by the megabyte: a row group of pictures can be larger than the memory.
    return pyarrow.parquet.ParquetFile(source, buffer_size=2**20, pre_buffer=False)


@contextmanager
def _readable(file: SourceFile) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        contents.refuse_stored(file)
        raise DataError(
            file.name,
            f"is not a readable {file.format} file: {error}",
            fix="check that the file was copied whole, or set `format` to what it is",
        ) from error
