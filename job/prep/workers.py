"""Converts the chunks of a source in worker processes: in order, and each only once."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace

from job import log, redaction, signals
from job.distributed.cores import cores
from job.prep import chunks
from job.prep.chunks import ChunkResult, SourceTask
from job.prep.readers import Record
from job.prep.splits import SAMPLE_ROWS

MAX_WORKERS = 16


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
        for number, chunk in enumerate(chunks.split_into_chunks(records)):
            if number == 0:
                first = chunk[:SAMPLE_ROWS]
            if task.result_path(number).exists():
                task = _with_leakage_by(task, first, processes)
                running.append((number, None))
            elif workers <= 1:
                task = _with_leakage_by(task, first, None)
                chunks.convert_chunk(task, number, chunk)
                running.append((number, None))
            else:
                if pending is not None:
                    processes = processes or worker_pool(workers)
                    task = _with_leakage_by(task, first, processes)
                    running.append(
                        (pending[0], processes.submit(chunks.convert_chunk, task, *pending))
                    )
                pending = (number, chunk)
            while len(running) > (2 * workers - 1 if workers > 1 else 0):
                yield _finished(task, *running.popleft())
        if pending is not None:
            task = _with_leakage_by(task, first, processes)
            future = processes.submit(chunks.convert_chunk, task, *pending) if processes else None
            if future is None:
                chunks.convert_chunk(task, *pending)
            running.append((pending[0], future))
        for number, future in sorted(running, key=lambda item: item[0]):
            yield _finished(task, number, future)
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
        by = processes.submit(chunks.leakage_by_of_source, task, first).result()
    else:
        by = chunks.leakage_by_of_source(task, first)
    if by == "image" and not task.classes and task.spec.leakage_by == "auto":
        log.info(
            "most rows share their answers, so held-out rows are kept apart by image only",
            source=task.label,
            to_decide="data.leakage_by",
        )
    return replace(task, leakage_by=by)


def _finished(task: SourceTask, number: int, future: Future[None] | None) -> ChunkResult:
    if future is not None:
        future.result()
    return chunks.read_result(task, number)


def available_workers(num_proc: int | None) -> int:
    """How many processes convert: `num_proc`, or by default the cores that this one may use."""
    if num_proc is not None:
        return num_proc
    return min(MAX_WORKERS, cores())


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end with this one and redact the same secrets."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_init_worker,
        initargs=(os.getpid(), redaction.known_secrets()),
    )


def _init_worker(parent: int, secrets: dict[str, str]) -> None:
    signals.die_with_parent(parent)
    redaction.add_known_secrets(secrets)
    redaction.install()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it
