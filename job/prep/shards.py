"""Prepared rows on disk: Arrow streams that training reads through a memory map."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from job.prep.records import Row

Split = Literal["train", "eval"]
ROWS_A_BATCH = 256
BYTES_A_SHARD = 512 * 2**20


def _schema() -> Any:
    import pyarrow as pa

    image = pa.struct([("bytes", pa.large_binary()), ("width", pa.int32()), ("height", pa.int32())])
    return pa.schema([("id", pa.string()), ("messages", pa.string()), ("images", pa.list_(image))])


class ShardWriter:
    """Writes one split as `<split>-00000.arrow` and on; memory stays at one batch."""

    def __init__(self, directory: Path, split: Split) -> None:
        self._directory, self._split = directory, split
        self._batch: list[dict[str, object]] = []
        self._stream: Any = None
        self._file: Any = None
        self._shards = 0
        self.rows = 0

    def write(self, row: Row) -> None:
        self._batch.append(row.to_record())
        self.rows += 1
        if len(self._batch) >= ROWS_A_BATCH:
            self._flush()

    def close(self) -> None:
        """Writes what is left; a split without rows leaves one empty shard."""
        if self._batch or not self._shards:
            self._flush()
        self._end_shard()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._stream is None:
            path = self._directory / f"{self._split}-{self._shards:05d}.arrow"
            self._file = pa.OSFile(str(path), "wb")
            self._stream = pa.ipc.new_stream(self._file, _schema())
            self._shards += 1
        self._stream.write_batch(pa.RecordBatch.from_pylist(self._batch, schema=_schema()))
        self._batch.clear()
        if self._file.tell() >= BYTES_A_SHARD:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._file.close()
            self._stream = self._file = None


class Rows(Sequence[Row]):
    """The rows of a split, read from the memory map when asked for."""

    def __init__(self, directory: Path, split: Split) -> None:
        import datasets

        shards = sorted(directory.glob(f"{split}-*.arrow"))
        assert shards, f"{directory} holds no shard of {split}"
        self._dataset = datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(shard)) for shard in shards]
        )

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Row.from_record(self._dataset[index])

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))
