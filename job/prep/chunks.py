"""Converts a source's records to shards, in chunks: in parallel, in order, and each only once.

A chunk is what one process converts, one shard of each split, and what a restarted job finds done.
Its note, `train-00003.json`, is written last.
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
from job.prep.columns import ReadOptions
from job.prep.convert import to_results
from job.prep.leakage import LeakageBy, NormalizeLabel, RowKeys, row_digest
from job.prep.readers import Record
from job.prep.rows import Reject, Row
from job.prep.shards import SPLITS, ShardWriter, Split
from job.prep.splits import SAMPLE_ROWS, is_held_out, resolve_leakage_by
from job.prep.statistics import Statistics
from job.prep.streaming import Chunk
from job.spec.types import DataSpec

ROWS, BYTES = 1024, 32 * 2**20
"""Where a chunk ends. Fixed, so that the same rows are in the same shard with any worker count."""
MAX_WORKERS = 16
SAMPLE = "sample.arrow"
"""A shard of full rows for the contact sheet, if training rows are stored without image bytes."""


@dataclass(frozen=True, kw_only=True)
class SourceTask:
    """How the chunks of one source become shards in `directory`."""

    spec: DataSpec
    split: Split
    options: ReadOptions
    directory: Path
    seed: int
    normalize_label: NormalizeLabel
    classes: bool
    """Whether answers are the labels of a few classes."""
    leakage_by: LeakageBy | None
    """None until the first rows of the source are seen."""
    hold_out: bool
    """Whether rows of this source are held out."""
    source_index: int | None = None
    """Index of the source if there are several to train on."""
    control_tokens: "re.Pattern[str]"
    """The model's control tokens, which no text may contain."""

    @property
    def label(self) -> str:
        """`train`, or `train[1]`."""
        return self.split if self.source_index is None else f"{self.split}[{self.source_index}]"

    def path(self, split: Split, number: int, suffix: str) -> Path:
        index = "" if self.source_index is None else f"{self.source_index:04d}-"
        return self.directory / f"{split}-{index}{number:05d}.{suffix}"

    def note_path(self, number: int) -> Path:
        return self.path(self.split, number, "json")


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """What is known of a converted chunk, beside its shards."""

    records: int
    leakage_by: LeakageBy
    statistics: dict[Split, Statistics]
    rejects: list[Reject]
    ignored: Counter[str]
    """Rows by ignored column or key."""
    junk_members: int
    chunk: Chunk | None
    """How to read its training rows again, if their image bytes are not stored."""


def split_into_chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += record.size
        if len(chunk) >= ROWS or size >= BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def convert_chunks(
    task: SourceTask, records: Iterator[Record], workers: int
) -> Iterator[ChunkResult]:
    """Converts the chunks that are not done yet; yields the results of all in order.

    At most two chunks per worker are in memory. A single chunk is converted in this process.
    """
    running: deque[tuple[int, Future[None] | None]] = deque()
    processes: ProcessPoolExecutor | None = None
    pending: tuple[int, list[Record]] | None = None
    first: list[Record] = []
    try:
        for number, chunk in enumerate(split_into_chunks(records)):
            if number == 0:
                first = chunk[:SAMPLE_ROWS]
            if task.note_path(number).exists():
                task = _with_leakage_by(task, first, processes)
                running.append((number, None))
            elif workers <= 1:
                task = _with_leakage_by(task, first, None)
                convert_chunk(task, number, chunk)
                running.append((number, None))
            else:
                if pending is not None:
                    processes = processes or worker_pool(workers)
                    task = _with_leakage_by(task, first, processes)
                    running.append((pending[0], processes.submit(convert_chunk, task, *pending)))
                pending = (number, chunk)
            while len(running) > (2 * workers - 1 if workers > 1 else 0):
                yield _result(task, *running.popleft())
        if pending is not None:
            task = _with_leakage_by(task, first, processes)
            future = processes.submit(convert_chunk, task, *pending) if processes else None
            if future is None:
                convert_chunk(task, *pending)
            running.append((pending[0], future))
        for number, future in sorted(running, key=lambda item: item[0]):
            yield _result(task, number, future)
    except BaseException:
        for child in multiprocessing.active_children():
            child.kill()  # a stopping job has only seconds
        raise
    finally:
        if processes is not None:
            processes.shutdown(cancel_futures=True)


def _with_leakage_by(
    task: SourceTask, first: list[Record], processes: ProcessPoolExecutor | None
) -> SourceTask:
    """The task with `leakage_by` set by the first records of its source; they are converted where
    chunks are: in a worker, or in this process."""
    if task.leakage_by is not None:
        return task
    if processes is not None:
        by = processes.submit(_resolve_leakage_by, task, first).result()
    else:
        by = _resolve_leakage_by(task, first)
    if by == "image" and not task.classes and task.spec.leakage_by == "auto":
        log.info(
            "most rows share their answers, so held-out rows are kept apart by image only",
            source=task.label,
            to_decide="data.leakage_by",
        )
    return replace(task, leakage_by=by)


def _resolve_leakage_by(task: SourceTask, first: list[Record]) -> LeakageBy:
    results = to_results(first, task.options)
    return resolve_leakage_by(task.spec, task.normalize_label, results, classes=task.classes)


def convert_chunk(task: SourceTask, number: int, records: list[Record]) -> None:
    """Converts one chunk to its shards and its note."""
    if task.source_index is not None:
        records = [replace(each, id=f"{task.label}/{each.id}") for each in records]
    output = _ChunkOutput(task, number)
    rejects, ignored = [], Counter[str]()
    for converted in to_results(records, task.options):
        result = _without_control_tokens(converted, task)
        if isinstance(result, Reject):
            rejects.append(result)
        else:
            ignored.update(result.ignored)
            output.write(result)
    output.close()
    chunk = None
    if task.spec.streaming and "train" in output.writers:
        shard = task.path("train", number, "arrow").name
        chunk = Chunk.of(shard, task.source_index or 0, records)
    note = {
        "records": len(records),
        "chunk": chunk.to_json() if chunk else None,
        "statistics": {split: each.to_json() for split, each in output.statistics.items()},
        "unread": ignored,
        "passed_over": sum(record.junk_members for record in records),
        "rejects": [[reject.id, reject.reason] for reject in rejects],
    }
    storage.write_text(str(task.note_path(number)), json.dumps(note))


def _without_control_tokens(result: Row | Reject, task: SourceTask) -> Row | Reject:
    """A row unchanged, or a reject if its text contains a control token."""
    if isinstance(result, Row) and (token := control.find(result.messages, task.control_tokens)):
        return Reject(id=result.id, reason=f"{control.FOUND}: {token}")
    return result


class _ChunkOutput:
    """The shards of one chunk, opened when their first row is written, and their statistics."""

    def __init__(self, task: SourceTask, number: int) -> None:
        self._task, self._number = task, number
        self.writers: dict[Split, ShardWriter] = {}
        self.statistics: dict[Split, Statistics] = {split: Statistics() for split in SPLITS}
        first = task.split == "train" and not task.source_index and number == 0
        sampled = task.spec.streaming and first
        self._sample = ShardWriter(task.directory / SAMPLE) if sampled else None

    def write(self, row: Row) -> None:
        task = self._task
        assert task.leakage_by is not None, "resolved before the first chunk"
        keys = RowKeys(row, task.normalize_label, task.leakage_by)
        held_out = task.hold_out and is_held_out(
            keys.split_group, fraction=task.spec.eval_fraction, seed=task.seed
        )
        split: Split = "eval" if held_out else task.split
        if split not in self.writers:
            path = task.path(split, self._number, "arrow")
            image_bytes = split == "eval" or not task.spec.streaming
            self.writers[split] = ShardWriter(path, image_bytes=image_bytes)
        own_keys = keys.eval_keys if split == "eval" else keys.train_keys
        digest = row_digest(row)
        self.writers[split].write(row, own_keys, digest)
        self.statistics[split].add(row)
        if self._sample is not None and split == "train":
            self._sample.write(row, own_keys, digest)

    def close(self) -> None:
        for writer in [*self.writers.values(), *([self._sample] if self._sample else [])]:
            writer.close()


def _result(task: SourceTask, number: int, future: Future[None] | None) -> ChunkResult:
    """The result of a converted chunk, from its note."""
    assert task.leakage_by is not None
    if future is not None:
        future.result()
    note: dict[str, Any] = json.loads(task.note_path(number).read_text(encoding="utf-8"))
    return ChunkResult(
        records=note["records"],
        leakage_by=task.leakage_by,
        statistics={split: Statistics.from_json(s) for split, s in note["statistics"].items()},
        rejects=[Reject(id=row_id, reason=reason) for row_id, reason in note["rejects"]],
        ignored=Counter(note["unread"]),
        junk_members=note["passed_over"],
        chunk=Chunk.from_json(note["chunk"]) if note["chunk"] else None,
    )


def available_workers(num_proc: int | None) -> int:
    """How many processes convert: `num_proc`, or by default the cores that this one may use."""
    if num_proc is not None:
        return num_proc
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end with this one and redact the same secrets."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_init_worker, initargs=(redaction.known(),)
    )


def _init_worker(secrets: dict[str, str]) -> None:
    redaction.adopt(secrets)
    redaction.install()
    signals.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it
