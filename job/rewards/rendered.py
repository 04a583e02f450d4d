"""The reward of formulas that render to the same image as their references, for many at a time."""

import signal
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType

from job import log
from job.distributed.cores import cores
from job.evaluation import latex, render_match
from job.evaluation.render_match import Ink
from job.prep.workers import worker_pool
from job.rewards.reward import Scored

CPU_SECONDS = 2.0
"""A formula that takes longer is not rendered; the slowest known take a tenth. It is time on the
processor, so a busy machine changes no reward."""
KEPT = 4096
"""Texts whose ink is kept: some kilobytes each."""
MIN_PARALLEL = 256
"""Fewer new formulas are rendered here, in less time than processes take to start."""
MAX_WORKERS = 16
_CHUNK = 16  # formulas that a worker takes at a time


class RenderMatchReward:
    """1 if answer and reference render to the same image, as in the metric `render_match`.

    A reference that mathtext cannot render is compared by its normal form. Worker processes start
    with the first call that has enough new formulas, and end with this process.
    """

    def __init__(self, workers: int | None = None, min_parallel: int = MIN_PARALLEL) -> None:
        """`workers` is the number of processes; None starts one for each core."""
        self._workers = min(MAX_WORKERS, cores()) if workers is None else workers
        self._min_parallel = min_parallel
        self._pool: ProcessPoolExecutor | None = None
        self._inks: OrderedDict[str, Ink | None] = OrderedDict()

    def __call__(self, answers: Sequence[Scored]) -> list[float]:
        """The rewards, in order."""
        references = {each.reference for each in answers}
        self._render(references)
        self._render(
            {each.answer for each in answers if self._inks[each.reference] is not None} - references
        )
        rewards = [float(self._same(each.answer, each.reference)) for each in answers]
        while len(self._inks) > KEPT:
            self._inks.popitem(last=False)
        return rewards

    def close(self) -> None:
        """Ends the worker processes; a later call starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _same(self, answer: str, reference: str) -> bool:
        expected = self._inks[reference]
        if expected is None:
            return latex.normalize(answer) == latex.normalize(reference)
        found = self._inks[answer]
        return found is not None and found.matches(expected)

    def _render(self, texts: set[str]) -> None:
        """Renders those that are not kept, and moves the others to the end of the queue."""
        for text in texts & self._inks.keys():
            self._inks.move_to_end(text)
        new = sorted(texts - self._inks.keys())
        self._inks.update(zip(new, self._render_new(new), strict=True))

    def _render_new(self, texts: list[str]) -> list[Ink | None]:
        enough = self._min_parallel if self._pool is None else _CHUNK
        if self._workers > 1 and len(texts) >= enough:
            self._pool = self._pool or worker_pool(self._workers)
            try:
                return list(self._pool.map(_ink_in_time, texts, chunksize=_CHUNK))
            except BrokenProcessPool:
                log.warn(
                    "a process that renders answers was killed; this one renders them from now on",
                    reward=render_match.NAME,
                    fix="raise the memory limit if it recurs",
                )
                self.close()
                self._workers = 1
        return list(map(_ink_in_time, texts))


def _ink_in_time(text: str) -> Ink | None:
    try:
        with _cpu_limit(CPU_SECONDS):
            return render_match.ink(text)
    except _TooSlowError:
        return None


class _TooSlowError(BaseException):
    """Not an `Exception`: rendering takes those for formulas that it cannot render."""


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raises _TooSlowError if the body computes for longer; only in a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if limited:
            raise _TooSlowError

    limited = True
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        limited = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
