"""Prefetches the shards that training needs next, in a separate process."""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from accelerate.data_loader import SeedableRandomSampler

from job.prep.streaming import FullShards, StreamedRows
from job.prep.workers import worker_pool
from job.train.sampler import DUMMY_ROW, BlockShuffleSampler, DistributedBatchSampler


class PrefetchingBatchSampler:
    """Yields a sampler's batches unchanged, and prefetches the shards of upcoming ones."""

    def __init__(
        self,
        batches: DistributedBatchSampler,
        rows: StreamedRows,
        indices: tuple[int, ...],
        buffer_size: int,
    ) -> None:
        """Batches hold positions in `indices`. The lookahead is about `buffer_size` rows."""
        self._batches, self._rows, self._indices = batches, rows, indices
        self._lookahead = -(-buffer_size // batches.batch_size)

    @property
    def sampler(self) -> SeedableRandomSampler | BlockShuffleSampler:
        return self._batches.sampler

    @property
    def batch_size(self) -> int:
        return self._batches.batch_size

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        upcoming: deque[list[int]] = deque()
        with ShardPrefetcher(self._rows.full_shards) as prefetcher:
            for batch in self._batches:
                upcoming.append(batch)
                rows = (self._indices[row] for row in batch if row != DUMMY_ROW)
                prefetcher.request(self._rows.shard_of(row) for row in rows)
                if len(upcoming) > self._lookahead:
                    yield upcoming.popleft()
            yield from upcoming


class ShardPrefetcher:
    """Fetches requested shards one after the other.

    If more are requested than fit, it fetches the latest requests: a resumed training skips all
    earlier ones.
    """

    def __init__(self, full_shards: FullShards) -> None:
        self._full_shards = full_shards
        self._room = full_shards.capacity // 2
        self._requested: OrderedDict[str, None] = OrderedDict()
        self._pending: deque[str] = deque(maxlen=self._room)
        self._running: Future[Path] | None = None
        self._lock = threading.RLock()
        self._pool = worker_pool(1)

    def request(self, shards: Iterable[str]) -> None:
        with self._lock:
            for shard in shards:
                if shard not in self._requested:
                    self._requested[shard] = None
                    self._pending.append(shard)
                while len(self._requested) > self._room:
                    self._requested.popitem(last=False)
            self._start_next()

    def _start_next(self) -> None:
        if self._pending and (self._running is None or self._running.done()):
            self._running = self._pool.submit(self._full_shards.fetch, self._pending.popleft())
            self._running.add_done_callback(self._done)

    def _done(self, future: "Future[Path]") -> None:
        # A failure is ignored here: the reader of the shard fetches it again, and reports errors.
        if not future.cancelled():
            with self._lock:
                self._start_next()

    def __enter__(self) -> "ShardPrefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._pending.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
