"""Chunks of records to shards: in several processes, in order, and each made once.

A chunk is the unit of everything: what one process converts, one shard of each split, and what a
job that was killed finds done. Its note, `train-00003.json`, is written last.
"""

import json
import multiprocessing
import os
import re
import signal
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job import log, redaction, signals, storage
from job.prep import control_tokens as control
from job.prep.columns import Reading
from job.prep.convert import to_results
from job.prep.leakage import By, Compared, LabelKey, whole_of
from job.prep.readers import Record
from job.prep.rows import Reject
from job.prep.shards import ShardWriter, Split
from job.prep.splits import SAMPLE as SAMPLED
from job.prep.splits import held_out, kept_apart_by
from job.prep.statistics import Statistics
from job.prep.streaming import Chunk
from job.spec.types import DataSpec

ROWS, BYTES = 1024, 32 * 2**20
"""Where a chunk ends: the same rows end up in the same shard, whoever makes it."""
MOST_WORKERS = 16
SAMPLE = "sample.arrow"
"""A shard of whole rows to be looked at, where those to train are kept without pictures."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """How the chunks of one source become shards in `directory`."""

    spec: DataSpec
    source: Split
    reading: Reading
    directory: Path
    seed: int
    label_key: LabelKey
    classes: bool
    """Whether answers are the labels of a few classes."""
    by: By | None
    """What keeps rows of both splits apart; None until the first rows of the source are seen."""
    splits: bool
    """Whether rows of this source are held out."""
    part: int | None = None
    """Which source of several to train on."""
    control: "re.Pattern[str]"
    """The model's control tokens, which no text may hold."""

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
    by: By
    """What keeps rows of both splits apart in their source."""
    statistics: dict[Split, Statistics]
    rejects: list[Reject]
    unread: Counter[str]
    """Rows by the columns and keys of theirs that are not read."""
    passed_over: int
    """Members of archives that are no data."""
    chunk: Chunk | None
    """What its rows to train were made of, where their pictures are not kept."""


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
    processes: ProcessPoolExecutor | None = None
    waiting: tuple[int, list[Record]] | None = None
    first: list[Record] = []
    try:
        for number, chunk in enumerate(chunks(records)):
            if number == 0:
                first = chunk[:SAMPLED]
            if task.path(task.source, number, "json").exists():
                task = _decided(task, first, processes)
                running.append((number, None))
            elif workers <= 1:
                task = _decided(task, first, None)
                convert(task, number, chunk)
                running.append((number, None))
            else:
                if waiting is not None:
                    processes = processes or pool(workers)
                    task = _decided(task, first, processes)
                    running.append((waiting[0], processes.submit(convert, task, *waiting)))
                waiting = (number, chunk)
            while len(running) > (2 * workers - 1 if workers > 1 else 0):
                yield _done(task, *running.popleft())
        if waiting is not None:
            task = _decided(task, first, processes)
            future = processes.submit(convert, task, *waiting) if processes else None
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
        if processes is not None:
            processes.shutdown(cancel_futures=True)


def _decided(task: Task, first: list[Record], processes: ProcessPoolExecutor | None) -> Task:
    """The task with what keeps its rows apart, by the first records of its source; they are looked
    at where chunks are converted, in a process of their own or in this one."""
    if task.by is not None:
        return task
    by = processes.submit(_apart, task, first).result() if processes else _apart(task, first)
    if by == "image" and not task.classes and task.spec.leakage_by == "auto":
        log.info(
            "most rows share their answers, so images alone tell held-out rows from the others",
            source=task.label,
            to_decide="data.leakage_by",
        )
    return replace(task, by=by)


def _apart(task: Task, first: list[Record]) -> By:
    found = to_results(first, task.reading)
    return kept_apart_by(task.spec, task.label_key, found, classes=task.classes)


def convert(task: Task, number: int, records: list[Record]) -> None:
    """One chunk to its shards and its note."""
    writers: dict[Split, ShardWriter] = {}
    statistics: dict[Split, Statistics] = {"train": Statistics(), "eval": Statistics()}
    rejects, unread = [], Counter[str]()
    sampled = task.spec.streaming and task.source == "train" and not task.part and number == 0
    sample = ShardWriter(task.directory / SAMPLE) if sampled else None
    if task.part is not None:
        records = [replace(each, id=f"{task.label}/{each.id}") for each in records]
    for result in to_results(records, task.reading):
        if isinstance(result, Reject):
            rejects.append(result)
            continue
        if (token := control.find(result.messages, task.control)) is not None:
            rejects.append(Reject(id=result.id, reason=f"{control.FOUND}: {token}"))
            continue
        unread.update(result.unread)
        assert task.by is not None, "`make` has looked at the first rows"
        compared = Compared(result, task.label_key, task.by)
        apart = task.splits and held_out(
            compared.group, fraction=task.spec.eval_fraction, seed=task.seed
        )
        split: Split = "eval" if apart else task.source
        if split not in writers:
            writers[split] = _writer(task, split, number)
        keys = compared.every_key if split == "eval" else compared.keys
        whole = whole_of(result)
        writers[split].write(result, keys, whole)
        statistics[split].add(result)
        if sample is not None and split == "train":
            sample.write(result, keys, whole)
    for writer in [*writers.values(), *([sample] if sample else [])]:
        writer.close()
    chunk = None
    if task.spec.streaming and "train" in writers:
        chunk = Chunk.of(task.path("train", number, "arrow").name, task.part or 0, records)
    note = {
        "records": len(records),
        "chunk": chunk.to_json() if chunk else None,
        "statistics": {split: kept.to_json() for split, kept in statistics.items()},
        "unread": unread,
        "passed_over": sum(record.passed_over for record in records),
        "rejects": [[reject.id, reject.reason] for reject in rejects],
    }
    storage.write_text(str(task.path(task.source, number, "json")), json.dumps(note))


def _writer(task: Task, split: Split, number: int) -> ShardWriter:
    pictures = split == "eval" or not task.spec.streaming
    return ShardWriter(task.path(split, number, "arrow"), pictures=pictures)


def available_workers(asked: int | None) -> int:
    """How many processes convert: as asked, or the cores that this one may use."""
    if asked is not None:
        return asked
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def _done(task: Task, number: int, future: Future[None] | None) -> Note:
    assert task.by is not None
    if future is not None:
        future.result()
    path = task.path(task.source, number, "json")
    note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Note(
        records=note["records"],
        by=task.by,
        statistics={split: Statistics.from_json(s) for split, s in note["statistics"].items()},
        rejects=[Reject(id=row_id, reason=reason) for row_id, reason in note["rejects"]],
        unread=Counter(note["unread"]),
        passed_over=note["passed_over"],
        chunk=Chunk.from_json(note["chunk"]) if note["chunk"] else None,
    )


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end with this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(redaction.known(),)
    )


def _start(secrets: dict[str, str]) -> None:
    redaction.adopt(secrets)
    redaction.install()
    signals.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job's own process answers it
