"""Shards that are fetched before training comes to them, in a process of their own."""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from job.prep.streaming import FullShards, StreamedRows
from job.prep.workers import worker_pool
from job.train.sampler import SPARE, SharedBatches


class Ahead:
    """The batches of a sampler as they are; the shards of those to come are fetched meanwhile."""

    def __init__(
        self, batches: SharedBatches, rows: StreamedRows, indices: tuple[int, ...], buffer_size: int
    ) -> None:
        """Batches name rows by their places in `indices`; as many as have about `buffer_size` rows
        are looked ahead."""
        self._batches, self._rows, self._indices = batches, rows, indices
        self._looked_ahead = -(-buffer_size // batches.batch_size)

    @property
    def sampler(self) -> Any:
        return self._batches.sampler

    @property
    def batch_size(self) -> int:
        return self._batches.batch_size

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        coming: deque[list[int]] = deque()
        with Fetcher(self._rows.full_shards) as fetcher:
            for batch in self._batches:
                coming.append(batch)
                named = (self._indices[row] for row in batch if row != SPARE)
                fetcher.want(self._rows.shard_of(row) for row in named)
                if len(coming) > self._looked_ahead:
                    yield coming.popleft()
            yield from coming


class Fetcher:
    """Fetches one shard after the other; of more than there is room for, the last that were asked
    for: a training that resumes passes over all that came before."""

    def __init__(self, full_shards: FullShards) -> None:
        self._full_shards = full_shards
        self._room = full_shards.capacity // 2
        self._asked: OrderedDict[str, None] = OrderedDict()
        self._waiting: deque[str] = deque(maxlen=self._room)
        self._running: Future[Path] | None = None
        self._lock = threading.RLock()
        self._pool = worker_pool(1)

    def want(self, shards: Iterable[str]) -> None:
        with self._lock:
            for shard in shards:
                if shard not in self._asked:
                    self._asked[shard] = None
                    self._waiting.append(shard)
                while len(self._asked) > self._room:
                    self._asked.popitem(last=False)
            self._go_on()

    def _go_on(self) -> None:
        if self._waiting and (self._running is None or self._running.done()):
            self._running = self._pool.submit(self._full_shards.fetch, self._waiting.popleft())
            self._running.add_done_callback(self._done)

    def _done(self, future: "Future[Path]") -> None:
        # Why one could not be fetched is told by who needs it and tries again.
        if not future.cancelled():
            with self._lock:
                self._go_on()

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
