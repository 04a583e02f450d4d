"""Tasks that run on background threads: uploads, digests, writes."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass


@dataclass(frozen=True)
class _Task:
    future: Future[None]
    size: int


class BackgroundTasks:
    """Runs tasks on a few threads, in submission order.

    At most `max_pending` tasks, and tasks of at most `max_size` in all, are unfinished at a time:
    `submit` blocks until enough complete, which bounds what they hold in memory or on disk. A
    larger task than `max_size` runs alone.

    Once a task has failed, tasks that have not started are skipped. The error is raised to the
    caller once, by the next `submit`, `check` or `finish`; of several, the first submitted.
    """

    def __init__(
        self,
        name: str,
        *,
        threads: int = 1,
        max_pending: int | None = None,
        max_size: int | None = None,
    ) -> None:
        self._threads, self._pool = threads, ThreadPoolExecutor(threads, name)
        self._max_pending, self._max_size = max_pending, max_size
        self._pending: deque[_Task] = deque()
        self._failed = threading.Event()

    def __enter__(self) -> "BackgroundTasks":
        return self

    def __exit__(self, *error: object) -> None:
        """Finishes all tasks; after an exception, only those that have started."""
        try:
            if error[0] is None:
                self.finish()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, task: Callable[[], None], size: int = 0) -> None:
        """Queues the task; blocks while too many are unfinished."""
        self.check()
        while self._pending and self._is_full(size):
            self._pending.popleft().future.result()
        self._pending.append(_Task(self._pool.submit(self._run, task), size))

    @property
    def size(self) -> int:
        """The size of the unfinished tasks in all; raises the error of a failed one."""
        self.check()
        return sum(task.size for task in self._pending)

    def check(self) -> None:
        """Raises the error of a failed task, if any; never blocks."""
        while self._pending and self._pending[0].future.done():
            self._pending.popleft().future.result()

    def finish(self) -> None:
        """Waits for all tasks. Nothing can be submitted afterwards."""
        while self._pending:
            self._pending.popleft().future.result()
        self._pool.shutdown()

    def cancel_waiting(self) -> int:
        """Cancels the tasks for which no thread is free; returns how many there were."""
        unfinished = [task.future for task in self._pending if not task.future.done()]
        canceled = {future for future in unfinished[self._threads :] if future.cancel()}
        self._pending = deque(task for task in self._pending if task.future not in canceled)
        return len(canceled)

    def abandon(self, timeout: float) -> None:
        """Cancels the tasks that have not started; waits up to `timeout` seconds for the others."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait([task.future for task in self._pending if not task.future.done()], timeout)

    def _is_full(self, size: int) -> bool:
        """Whether a task of this size has to wait for others."""
        if self._max_pending is not None and len(self._pending) >= self._max_pending:
            return True
        unfinished = sum(task.size for task in self._pending)
        return self._max_size is not None and unfinished + size > self._max_size

    def _run(self, task: Callable[[], None]) -> None:
        if self._failed.is_set():
            return
        try:
            task()
        except BaseException:
            self._failed.set()
            raise
