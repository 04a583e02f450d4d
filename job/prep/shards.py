"""Prepared rows on disk: Arrow streams that training reads through a memory map."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from job.prep.rows import Row

Split = Literal["train", "eval"]
ROWS_A_BATCH, BYTES_A_BATCH = 256, 16 * 2**20
BESIDE_PICTURES = 512
"""Bytes of a row beside its pictures, about, where its text is short."""
COLUMNS = ["id", "messages", "images"]
"""What makes a row; the other columns are digests, to find rows that are alike."""


def schema() -> Any:
    """The columns of a shard: a row's own, then digests of what it shows and says."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.large_binary()), ("width", pa.int32()), ("height", pa.int32())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("messages", pa.string()),
            ("images", pa.list_(image)),
            ("keys", pa.list_(pa.uint64())),  # equal to a held-out row's: leaked
            ("whole", pa.uint64()),  # equal: the same row
            ("looks", pa.list_(pa.binary())),  # near: pictures that look the same
        ]
    )


class ShardWriter:
    """Writes one shard; it is there, whole, once `close` was called, and memory holds a batch."""

    def __init__(self, path: Path, *, pictures: bool = True) -> None:
        """Without `pictures` their sizes and digests are written, and not their bytes."""
        import pyarrow as pa

        self._path, self._partial = path, path.with_suffix(".partial")
        self._pictures = pictures
        self._batch: list[dict[str, object]] = []
        self._bytes = self.rows = 0
        self._schema = schema()
        self._file = pa.OSFile(str(self._partial), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def write(self, row: Row, keys: list[int], whole: int) -> None:
        looks = [image.look for image in row.images]
        if not self._pictures:
            row = row.without_pictures()
        self._batch.append({**row.to_record(), "keys": keys, "whole": whole, "looks": looks})
        self._bytes += sum(len(image.data) for image in row.images)
        self.rows += 1
        if len(self._batch) >= ROWS_A_BATCH or self._bytes >= BYTES_A_BATCH:
            self._flush()

    def copy(self, batch: Any) -> None:
        """Writes a batch of another shard as it is."""
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


def shards(directory: Path, split: Split, part: int | None = None) -> list[Path]:
    """The split's shards in order; of one source alone where it is that of several."""
    pattern = f"{split}-*.arrow" if part is None else f"{split}-{part:04d}-*.arrow"
    return sorted(directory.glob(pattern))


def order_file(directory: Path, split: Split) -> Path:
    """Where the order of a split's rows is kept, if it is not that of its shards."""
    return directory / f"{split}-order.npy"


def batches(path: Path, columns: list[str] | None = None) -> Iterator[Any]:
    """A shard's batches from the memory map; columns that are not asked for are not read."""
    import pyarrow as pa

    with ExitStack() as stack:
        file = stack.enter_context(pa.memory_map(str(path)))
        for batch in stack.enter_context(pa.ipc.open_stream(file)):
            yield batch.select(columns) if columns else batch


def starts(found: Sequence[Path]) -> list[int]:
    """The number of each shard's first row among the rows of all, and last how many there are."""
    return [0, *accumulate(sum(map(len, batches(shard, ["whole"]))) for shard in found)]


def locate(begins: Sequence[int], number: int) -> tuple[int, int]:
    """The number of the shard that holds a row, and the row's in it; `begins` is from `starts`."""
    shard = bisect_right(begins, number) - 1
    return shard, number - begins[shard]


def pick(directory: Path, split: Split, count: int, seed: int) -> list[Row]:
    """At most `count` rows of a split, chosen by `seed`, in order; only their shards are mapped."""
    import numpy as np

    found, path = shards(directory, split), order_file(directory, split)
    begins = starts(found)
    order = np.load(path, mmap_mode="r") if path.exists() else range(begins[-1])
    chooser = random.Random(seed)  # noqa: S311 - a sample, not a secret
    places = sorted(chooser.sample(range(len(order)), min(count, len(order))))
    located = [locate(begins, int(order[place])) for place in places]
    return [Rows([found[shard]])[row] for shard, row in located]


class Rows(Sequence[Row]):
    """The rows of shards, read from the memory map when asked for."""

    def __init__(self, found: Sequence[Path], order: Path | None = None) -> None:
        import datasets

        self._dataset = datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(shard)) for shard in found]
        ).select_columns(COLUMNS)
        if order is not None:
            import numpy as np

            self._dataset = self._dataset.select(np.load(order))

    @classmethod
    def of(cls, directory: Path, split: Split) -> "Rows":
        """The rows of a split, in its order."""
        found, order = shards(directory, split), order_file(directory, split)
        assert found, f"{directory} holds no shard of {split}"
        return cls(found, order if order.exists() else None)

    def __len__(self) -> int:
        return len(self._dataset)

    def ids(self) -> list[str]:
        """What the rows are called, in their order."""
        return list(map(str, self._dataset["id"]))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Row.from_record(self._dataset[index])

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))
