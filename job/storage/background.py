"""Tasks that run on background threads: uploads, digests, writes."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class BackgroundTasks:
    """Runs tasks on a few threads, in submission order.

    At most `max_pending` tasks are unfinished at a time: `submit` blocks until one completes, which
    bounds what they hold in memory or on disk.

    Once a task has failed, tasks that have not started are skipped. The error is raised to the
    caller once, by the next `submit`, `check` or `finish`; of several, the first submitted.
    """

    def __init__(self, name: str, *, threads: int = 1, max_pending: int | None = None) -> None:
        self._threads, self._pool = threads, ThreadPoolExecutor(threads, name)
        self._max_pending = max_pending
        self._pending: deque[Future[None]] = deque()
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

    def submit(self, task: Callable[[], None]) -> None:
        """Queues the task; blocks while `max_pending` tasks are unfinished."""
        self.check()
        while self._max_pending is not None and len(self._pending) >= self._max_pending:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._run, task))

    def check(self) -> None:
        """Raises the error of a failed task, if any; never blocks."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def finish(self) -> None:
        """Waits for all tasks. Nothing can be submitted afterwards."""
        while self._pending:
            self._pending.popleft().result()
        self._pool.shutdown()

    def cancel_waiting(self) -> int:
        """Cancels the tasks for which no thread is free; returns how many there were."""
        unfinished = [task for task in self._pending if not task.done()]
        canceled = {task for task in unfinished[self._threads :] if task.cancel()}
        self._pending = deque(task for task in self._pending if task not in canceled)
        return len(canceled)

    def abandon(self, timeout: float) -> None:
        """Cancels the tasks that have not started; waits up to `timeout` seconds for the others."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait([task for task in self._pending if not task.done()], timeout)

    def _run(self, task: Callable[[], None]) -> None:
        if self._failed.is_set():
            return
        try:
            task()
        except BaseException:
            self._failed.set()
            raise
