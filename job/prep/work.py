"""Chunks of records to shards: in several processes, in order, and each made once.

A chunk is the unit of everything: what one process converts, one shard of each split, and what a
job that was killed finds done. Its note, `train-00003.json`, is written last.
"""

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job import signals, storage
from job.prep.columns import Columns
from job.prep.convert import to_result
from job.prep.leakage import LabelKey, keys_of, whole_of
from job.prep.readers import Record
from job.prep.records import Reject, Row
from job.prep.shards import ShardWriter, Split
from job.prep.splits import held_out, split_key
from job.prep.statistics import Statistics
from job.spec.types import DataSpec

ROWS, BYTES = 1024, 32 * 2**20
"""Where a chunk ends: the same rows end up in the same shard, whoever makes it."""
MOST_WORKERS = 16
_FETCHED_AHEAD = 8  # images asked for at once where they come over a network


@dataclass(frozen=True, kw_only=True)
class Task:
    """How the chunks of one source become shards in `directory`."""

    spec: DataSpec
    source: Split
    columns: Columns
    directory: Path
    seed: int
    label_key: LabelKey
    splits: bool
    """Whether rows of this source are held out."""
    part: int | None = None
    """Which source of several to train on."""

    @property
    def label(self) -> str:
        """The source as people know it: `train`, or `train[1]`."""
        return self.source if self.part is None else f"{self.source}[{self.part}]"

    def path(self, split: Split, number: int, ending: str) -> Path:
        part = "" if self.part is None else f"{self.part:04d}-"
        return self.directory / f"{split}-{part}{number:05d}.{ending}"


@dataclass(frozen=True, kw_only=True)
class Note:
    """What is known of a chunk that is done."""

    records: int
    statistics: dict[Split, Statistics]
    rejects: list[Reject]


def chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    found: list[Record] = []
    size = 0
    for record in records:
        found.append(record)
        size += record.size
        if len(found) >= ROWS or size >= BYTES:
            yield found
            found, size = [], 0
    if found:
        yield found


def make(task: Task, records: Iterator[Record], workers: int) -> Iterator[Note]:
    """Makes the shards that are not there yet, and gives every chunk's note in order.

    At most two chunks a worker are in memory. A single chunk is made in this process.
    """
    running: deque[tuple[int, Future[None] | None]] = deque()
    pool: ProcessPoolExecutor | None = None
    waiting: tuple[int, list[Record]] | None = None
    try:
        for number, chunk in enumerate(chunks(records)):
            if task.path(task.source, number, "json").exists():
                running.append((number, None))
            elif workers <= 1:
                convert(task, number, chunk)
                running.append((number, None))
            else:
                if waiting is not None:
                    pool = pool or _pool(workers)
                    running.append((waiting[0], pool.submit(convert, task, *waiting)))
                waiting = (number, chunk)
            while len(running) > (2 * workers - 1 if workers > 1 else 0):
                yield _done(task, *running.popleft())
        if waiting is not None:
            future = pool.submit(convert, task, *waiting) if pool else None
            if future is None:
                convert(task, *waiting)
            running.append((waiting[0], future))
        for number, future in sorted(running, key=lambda item: item[0]):
            yield _done(task, number, future)
    except BaseException:
        for child in multiprocessing.active_children():
            child.kill()  # who is asked to stop has seconds
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def convert(task: Task, number: int, records: list[Record]) -> None:
    """One chunk to its shards and its note."""
    writers: dict[Split, ShardWriter] = {}
    statistics: dict[Split, Statistics] = {"train": Statistics(), "eval": Statistics()}
    rejects = []
    for result in _results(task, records):
        if isinstance(result, Reject):
            rejects.append(result)
            continue
        apart = task.splits and held_out(
            split_key(result, task.label_key), fraction=task.spec.eval_fraction, seed=task.seed
        )
        split: Split = "eval" if apart else task.source
        if split not in writers:
            writers[split] = ShardWriter(task.path(split, number, "arrow"))
        writers[split].write(result, keys_of(result, task.label_key), whole_of(result))
        statistics[split].add(result)
    for writer in writers.values():
        writer.close()
    note = {
        "records": len(records),
        "statistics": {split: kept.to_json() for split, kept in statistics.items()},
        "rejects": [[reject.id, reject.reason] for reject in rejects],
    }
    storage.write_text(str(task.path(task.source, number, "json")), json.dumps(note))


def available_workers(asked: int | None) -> int:
    """How many processes convert: as asked, or the cores that this one may use."""
    if asked is not None:
        return asked
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def _results(task: Task, records: list[Record]) -> Iterator[Row | Reject]:
    def one(record: Record) -> Row | Reject:
        if task.part is not None:
            record = replace(record, id=f"{task.label}/{record.id}")
        return to_result(record, task.columns, task.spec)

    remote = any(record.base and not storage.is_local(record.base) for record in records)
    if not remote and not task.spec.allow_image_urls:
        yield from map(one, records)
        return
    with ThreadPoolExecutor(_FETCHED_AHEAD, thread_name_prefix="prep") as threads:
        for start in range(0, len(records), 4 * _FETCHED_AHEAD):
            yield from threads.map(one, records[start : start + 4 * _FETCHED_AHEAD])


def _done(task: Task, number: int, future: Future[None] | None) -> Note:
    if future is not None:
        future.result()
    path = task.path(task.source, number, "json")
    note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Note(
        records=note["records"],
        statistics={split: Statistics.from_json(s) for split, s in note["statistics"].items()},
        rejects=[Reject(id=row_id, reason=reason) for row_id, reason in note["rejects"]],
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start)


def _start() -> None:
    signals.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job's own process answers it
