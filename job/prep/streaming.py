"""Training data larger than the disk: rows without image bytes, whose images are read again.

Prep still reads the whole source once, so every row is checked, counted and compared with the
held-out ones. When training first asks for a row of a shard, the full shard is rebuilt from its
records, and each row must equal the one that prep read. The disk holds as many full shards as the
shuffle buffer needs.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from job import log
from job.errors import DataError
from job.prep import sources
from job.prep.columns import ReadOptions
from job.prep.convert import to_results
from job.prep.leakage import row_digest
from job.prep.readers import Record, RecordPosition
from job.prep.rows import Reject, Row
from job.prep.shards import Rows, ShardWriter, batches, locate, order_file, row_offsets, shard_paths
from job.prep.source_files import DataSource
from job.spec.types import DataSpec

CHUNKS = "chunks.jsonl"
_MAX_MAPPED = 16  # shards that a process keeps mapped


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The records of one training shard, a line of `chunks.jsonl`."""

    shard: str
    source: int
    """Index of the training source."""
    first: RecordPosition
    numbers: tuple[int, ...] | None
    """Of the records in the source; None if they are consecutive."""
    records: int

    @classmethod
    def of(cls, shard: str, source: int, records: Sequence[Record]) -> "Chunk":
        positions = [record.position for record in records]
        numbers = tuple(position.number for position in positions if position is not None)
        assert len(numbers) == len(records), "every record has a position"
        assert positions[0] is not None
        consecutive = numbers[-1] - numbers[0] == len(numbers) - 1
        return cls(
            shard=shard,
            source=source,
            first=positions[0],
            numbers=None if consecutive else numbers,
            records=len(records),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Chunk":
        numbers = value["numbers"]
        return cls(
            **{
                **value,
                "first": RecordPosition(**value["first"]),
                "numbers": None if numbers is None else tuple(numbers),
            }
        )

    def read(self, source: DataSource, spec: DataSpec) -> list[Record]:
        start = self.first.number
        numbers = self.numbers or range(start, start + self.records)
        return list(sources.reread(source, spec.train[self.source], self.first, numbers))


def max_full_shards(spec: DataSpec, rows: int) -> int:
    """The number of full shards, of `rows` rows each, to keep on disk.

    Those that are shuffled together, as many that are prefetched, and four more per source for
    shards that are only partly used.
    """
    return 2 * (-(-spec.shuffle_buffer_size // rows) + 2 * len(spec.train))


@dataclass(frozen=True, kw_only=True)
class FullShards:
    """Training shards with image bytes, rebuilt in `folder` on demand.

    Several processes may share the folder.
    """

    spec: DataSpec
    sources: tuple[DataSource, ...]
    """The training sources."""
    directory: Path
    """Prep's output, with `chunks.jsonl`."""
    folder: Path
    options: tuple[ReadOptions, ...]
    """Of each source."""
    chunks: dict[str, Chunk] = field(repr=False)
    """By name of the shard."""
    capacity: int
    """Shards in the folder at most."""

    @classmethod
    def of(
        cls, spec: DataSpec, sources: Sequence[DataSource], directory: Path, folder: Path
    ) -> "FullShards":
        with (directory / CHUNKS).open(encoding="utf-8") as lines:
            chunks = [Chunk.from_json(json.loads(line)) for line in lines]
        records = sum(chunk.records for chunk in chunks)
        return cls(
            spec=spec,
            sources=tuple(sources),
            options=tuple(ReadOptions.of(source, spec) for source in spec.train),
            directory=directory,
            folder=folder,
            chunks={chunk.shard: chunk for chunk in chunks},
            capacity=max_full_shards(spec, max(1, records // max(1, len(chunks)))),
        )

    def fetch(self, shard: str) -> Path:
        """The full shard, rebuilt if it is not in the folder.

        Raises DataError if a row of the source has changed since prep.
        """
        from filelock import FileLock

        path = self.folder / shard
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    self._rebuild(shard, path)
                    self._evict_oldest()
        with suppress(FileNotFoundError):  # another process may have evicted it
            path.touch()
        return path

    def _rebuild(self, shard: str, path: Path) -> None:
        chunk = self.chunks[shard]
        source = self.sources[chunk.source]
        results = to_results(chunk.read(source, self.spec), self.options[chunk.source])
        writer = ShardWriter(path)
        for batch in batches(self.directory / shard, ["id", "whole"]):
            for stored in batch.to_pylist():
                row = _find_row(results, stored["whole"], stored["id"], source.uri)
                writer.write(replace(row, id=stored["id"]), [], stored["whole"])
        writer.close()
        log.debug("rebuilt", shard=shard, rows=writer.rows)

    def _evict_oldest(self) -> None:
        """Removes the least recently used shards."""
        used = []
        for path in self.folder.glob("*.arrow"):
            with suppress(FileNotFoundError):
                used.append((path.stat().st_mtime, path))
        for _, path in sorted(used)[: -self.capacity]:
            path.unlink(missing_ok=True)


def _find_row(results: Iterator[Row | Reject], digest: int, row_id: str, uri: str) -> Row:
    """The next row of that digest; skips rejects, held-out rows and leaked rows before it."""
    reject = ""
    for result in results:
        if isinstance(result, Reject):
            reject = reject or f"; a row near it is rejected now: {result.reason}"
        elif row_digest(result) == digest:
            return result
    raise DataError(
        row_id,
        f"has changed since the rows were prepared{reject}",
        value=uri,
        fix="start the job again when the source is readable and no longer changes: changed rows "
        "are prepared again",
    )


class StreamedRows(Sequence[Row]):
    """The training rows with their images; reading one fetches its full shard."""

    def __init__(self, full_shards: FullShards) -> None:
        import numpy as np

        self.full_shards = full_shards
        directory = full_shards.directory
        self._shards = [path.name for path in shard_paths(directory, "train")]
        self._offsets = row_offsets([directory / name for name in self._shards])
        order = order_file(directory, "train")
        self._order = np.load(order) if order.exists() else None
        self._mapped: OrderedDict[str, Rows] = OrderedDict()

    def __len__(self) -> int:
        return self._offsets[-1] if self._order is None else len(self._order)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, row = self._locate(index)
        return self._map(self._shards[shard])[row]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def shard_of(self, index: int) -> str:
        """The name of the shard that contains a row."""
        return self._shards[self._locate(index)[0]]

    def blocks(self) -> list[int]:
        """The index of each shard's first row; in a mixture, of equal blocks of a shard's size."""
        if self._order is None:
            return self._offsets[:-1]
        rows = max(1, self._offsets[-1] // len(self._shards))
        return list(range(0, len(self), rows))

    def _locate(self, index: int) -> tuple[int, int]:
        """The shard that contains a row, and the row's index in it."""
        return locate(self._offsets, index if self._order is None else int(self._order[index]))

    def _map(self, shard: str) -> Rows:
        while shard not in self._mapped:
            path = self.full_shards.fetch(shard)
            with suppress(FileNotFoundError):  # another process has just evicted it
                self._mapped[shard] = Rows([path])
        self._mapped.move_to_end(shard)
        while len(self._mapped) > _MAX_MAPPED:
            self._mapped.popitem(last=False)
        return self._mapped[shard]
