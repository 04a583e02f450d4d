"""Prepared rows on disk: Arrow streams that training reads through a memory map."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from job.prep.rows import Row

if TYPE_CHECKING:
    import pyarrow as pa

Split = Literal["train", "eval", "validation"]
SPLITS: tuple[Split, ...] = ("train", "eval", "validation")
"""All splits; a spec need not have rows to validate on (`job.prep.splits.splits_of`)."""
BATCH_ROWS, BATCH_BYTES = 256, 16 * 2**20
BYTES_BESIDE_IMAGES = 512
"""Approximate bytes of a row without its images, if its text is short."""
ROW_COLUMNS = ["id", "messages", "images"]
"""What makes a row; the other columns are digests, to find duplicates."""


def schema() -> "pa.Schema":
    """The columns of a shard: the row's own, then its digests."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.large_binary()), ("width", pa.int32()), ("height", pa.int32())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("messages", pa.string()),
            ("images", pa.list_(image)),
            ("keys", pa.list_(pa.uint64())),  # one shared with a held-out row: leaked
            ("whole", pa.uint64()),  # the row's digest; equal for the same row
            ("looks", pa.list_(pa.binary())),  # difference hashes; near for similar images
        ]
    )


class ShardWriter:
    """Writes one shard, a batch at a time. The file appears, complete, on `close`."""

    def __init__(self, path: Path, *, image_bytes: bool = True) -> None:
        """Without `image_bytes`, only sizes and digests of images are written."""
        import pyarrow as pa

        self._path, self._partial = path, path.with_suffix(".partial")
        self._image_bytes = image_bytes
        self._batch: list[dict[str, object]] = []
        self._bytes = self.rows = 0
        self._schema = schema()
        self._file = pa.OSFile(str(self._partial), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def write(self, row: Row, keys: list[int], row_digest: int) -> None:
        hashes = [image.difference_hash for image in row.images]
        if not self._image_bytes:
            row = row.without_image_bytes()
        self._batch.append({**row.to_record(), "keys": keys, "whole": row_digest, "looks": hashes})
        self._bytes += sum(len(image.data) for image in row.images)
        self.rows += 1
        if len(self._batch) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._flush()

    def copy(self, batch: "pa.RecordBatch") -> None:
        """Writes a batch of another shard unchanged."""
        self.rows += len(batch)
        self._stream.write_batch(batch)

    def close(self) -> None:
        self._flush()
        self._stream.close()
        self._file.close()
        self._partial.replace(self._path)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._batch:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._batch, schema=self._schema))
            self._batch.clear()
            self._bytes = 0


def shard_paths(directory: Path, split: Split, source_index: int | None = None) -> list[Path]:
    """The split's shards in order; of a mixture, optionally those of one source."""
    pattern = f"{split}-*.arrow" if source_index is None else f"{split}-{source_index:04d}-*.arrow"
    return sorted(directory.glob(pattern))


def order_file(directory: Path, split: Split) -> Path:
    """The file with the order of a split's rows; absent if it is that of its shards."""
    return directory / f"{split}-order.npy"


def batches(path: Path, columns: list[str] | None = None) -> "Iterator[pa.RecordBatch]":
    """A shard's batches from the memory map; other columns are not read."""
    import pyarrow as pa

    with ExitStack() as stack:
        file = stack.enter_context(pa.memory_map(str(path)))
        for batch in stack.enter_context(pa.ipc.open_stream(file)):
            yield batch.select(columns) if columns else batch


def count_rows(shard: Path) -> int:
    return sum(map(len, batches(shard, ["whole"])))


def row_offsets(shards: Sequence[Path]) -> list[int]:
    """The index of each shard's first row among all rows, then the number of rows."""
    return [0, *accumulate(map(count_rows, shards))]


def locate(offsets: Sequence[int], index: int) -> tuple[int, int]:
    """The shard that contains a row, and the row's index in it; `offsets` from `row_offsets`."""
    shard = bisect_right(offsets, index) - 1
    return shard, index - offsets[shard]


def sample_rows(directory: Path, split: Split, count: int, seed: int) -> list[Row]:
    """At most `count` random rows of a split, in order; only their shards are mapped."""
    import numpy as np

    shards, path = shard_paths(directory, split), order_file(directory, split)
    offsets = row_offsets(shards)
    order = np.load(path, mmap_mode="r") if path.exists() else range(offsets[-1])
    rng = random.Random(seed)  # noqa: S311 - a sample, not a secret
    indices = sorted(rng.sample(range(len(order)), min(count, len(order))))
    located = [locate(offsets, int(order[index])) for index in indices]
    return [Rows([shards[shard]])[row] for shard, row in located]


class Rows(Sequence[Row]):
    """The rows of shards, read lazily from the memory map."""

    def __init__(self, shards: Sequence[Path], order: Path | None = None) -> None:
        import datasets

        self._dataset = datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(shard)) for shard in shards]
        ).select_columns(ROW_COLUMNS)
        if order is not None:
            import numpy as np

            self._dataset = self._dataset.select(np.load(order))

    @classmethod
    def of(cls, directory: Path, split: Split) -> "Rows":
        """The rows of a split, in its order."""
        shards, order = shard_paths(directory, split), order_file(directory, split)
        assert shards, f"{directory} has no shard of {split}"
        return cls(shards, order if order.exists() else None)

    def __len__(self) -> int:
        return len(self._dataset)

    def ids(self) -> list[str]:
        """The ids of the rows, in order."""
        return list(map(str, self._dataset["id"]))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Row.from_record(self._dataset[index])

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))
