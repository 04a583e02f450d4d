"""Rows larger than the disk: what prep keeps of them, and their pictures read again as they train.

Prep reads the whole source once, as ever, so that every row is checked, counted and compared with
the held-out ones. Of the rows to train it keeps everything but the bytes of their pictures. A shard
is made whole again, from the records that it was made of, when the first of its rows is asked for;
so many shards are kept as the shuffle buffer needs, and each row has to be what prep saw.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from job import log
from job.errors import DataError
from job.prep import sources
from job.prep.columns import Reading
from job.prep.convert import to_results
from job.prep.discovery import StagedSource
from job.prep.leakage import whole_of
from job.prep.readers import Record, RecordPosition
from job.prep.rows import Reject, Row
from job.prep.shards import Rows, ShardWriter, batches, locate, order_file, shards, starts
from job.spec.types import DataSpec

CHUNKS = "chunks.jsonl"
_OPEN = 16  # shards that a process keeps mapped


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The records that a shard was made of."""

    shard: str
    source: int
    """Number of the source among those to train on."""
    first: RecordPosition
    numbers: tuple[int, ...] | None
    """Of the records in the source; None where they follow each other."""
    records: int

    @classmethod
    def of(cls, shard: str, source: int, records: Sequence[Record]) -> "Chunk":
        places = [record.place for record in records]
        numbers = tuple(place.number for place in places if place is not None)
        assert len(numbers) == len(records), "each record's place is known"
        assert places[0] is not None
        follow = numbers[-1] - numbers[0] == len(numbers) - 1
        return cls(
            shard=shard,
            source=source,
            first=places[0],
            numbers=None if follow else numbers,
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

    def read(self, source: StagedSource, spec: DataSpec) -> list[Record]:
        start = self.first.number
        numbers = self.numbers or range(start, start + self.records)
        return list(sources.read_again(source, spec.train[self.source], self.first, numbers))


def kept_shards(spec: DataSpec, rows: int) -> int:
    """How many shards of so many rows the disk holds at most: those that are shuffled together, as
    many that are fetched ahead, and room for sources that begin and end in the middle of one."""
    return 2 * (-(-spec.shuffle_buffer_size // rows) + 2 * len(spec.train))


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Whole shards of the rows to train, made again in the folder `place` when they are needed.

    Any number of processes may share the folder.
    """

    spec: DataSpec
    sources: tuple[StagedSource, ...]
    """Those to train on."""
    directory: Path
    """What prep left; it holds `chunks.jsonl`."""
    place: Path
    readings: tuple[Reading, ...]
    """How rows are read, of each source."""
    chunks: dict[str, Chunk] = field(repr=False)
    """By the name of the shard."""
    kept: int
    """Shards in the folder at most."""

    @classmethod
    def of(
        cls, spec: DataSpec, staged: Sequence[StagedSource], directory: Path, place: Path
    ) -> "Pictures":
        with (directory / CHUNKS).open(encoding="utf-8") as lines:
            found = [Chunk.from_json(json.loads(line)) for line in lines]
        records = sum(chunk.records for chunk in found)
        return cls(
            spec=spec,
            sources=tuple(staged),
            readings=tuple(Reading.of(source, spec) for source in spec.train),
            directory=directory,
            place=place,
            chunks={chunk.shard: chunk for chunk in found},
            kept=kept_shards(spec, max(1, records // max(1, len(found)))),
        )

    def whole(self, shard: str) -> Path:
        """The shard with its pictures.

        Raises DataError where the source no longer holds a row as prep saw it.
        """
        from filelock import FileLock

        path = self.place / shard
        if not path.exists():
            self.place.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    self._make(shard, path)
                    self._make_room()
        with suppress(FileNotFoundError):  # another process may have made room
            path.touch()
        return path

    def _make(self, shard: str, path: Path) -> None:
        chunk = self.chunks[shard]
        source = self.sources[chunk.source]
        found = to_results(chunk.read(source, self.spec), self.readings[chunk.source])
        writer = ShardWriter(path)
        for batch in batches(self.directory / shard, ["id", "whole"]):
            for wanted in batch.to_pylist():
                row = _next(found, wanted["whole"], wanted["id"], source.uri)
                writer.write(replace(row, id=wanted["id"]), [], wanted["whole"])
        writer.close()
        log.debug("read again", shard=shard, rows=writer.rows)

    def _make_room(self) -> None:
        """Removes the shards that were not used for longest."""
        used = []
        for path in self.place.glob("*.arrow"):
            with suppress(FileNotFoundError):
                used.append((path.stat().st_mtime, path))
        for _, path in sorted(used)[: -self.kept]:
            path.unlink(missing_ok=True)


def _next(found: Iterator[Row | Reject], whole: int, row_id: str, uri: str) -> Row:
    """The next row of that digest: what prep refused, held out or dropped stands before it."""
    refused = ""
    for each in found:
        if isinstance(each, Reject):
            refused = refused or f"; of its neighbours one is refused now: {each.reason}"
        elif whole_of(each) == whole:
            return each
    raise DataError(
        row_id,
        f"is not as it was when the rows were prepared{refused}",
        value=uri,
        fix="start the job again once the source can be read and no longer changes: rows that "
        "changed are prepared again",
    )


class StreamedRows(Sequence[Row]):
    """The rows to train, whole; each comes with the shard that holds it."""

    def __init__(self, pictures: Pictures) -> None:
        import numpy as np

        self.pictures = pictures
        self._shards = [path.name for path in shards(pictures.directory, "train")]
        self._starts = starts([pictures.directory / name for name in self._shards])
        order = order_file(pictures.directory, "train")
        self._order = np.load(order) if order.exists() else None
        self._opened: OrderedDict[str, Rows] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1] if self._order is None else len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, row = self._find(index)
        return self._open(self._shards[shard])[row]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def shard_of(self, index: int) -> str:
        """The name of the shard that holds a row."""
        return self._shards[self._find(index)[0]]

    def blocks(self) -> list[int]:
        """Where the rows of each shard begin; in a mixture, of as many rows as a shard has."""
        if self._order is None:
            return self._starts[:-1]
        rows = max(1, self._starts[-1] // len(self._shards))
        return list(range(0, len(self), rows))

    def _find(self, index: int) -> tuple[int, int]:
        """The number of the shard that holds a row, and the row's number in it."""
        return locate(self._starts, index if self._order is None else int(self._order[index]))

    def _open(self, shard: str) -> Rows:
        while shard not in self._opened:
            path = self.pictures.whole(shard)
            with suppress(FileNotFoundError):  # another process has just made room
                self._opened[shard] = Rows([path])
        self._opened.move_to_end(shard)
        while len(self._opened) > _OPEN:
            self._opened.popitem(last=False)
        return self._opened[shard]
