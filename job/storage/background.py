"""Calls in background threads, with errors raised to the caller."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """A few threads; `submit` blocks while `most` calls are unfinished, to bound their memory.

    The error of a failed call is raised by the next `submit`, `check` or `finish`, the earliest
    submitted first.
    """

    def __init__(self, name: str, *, threads: int = 1, most: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._most = most
        self._calls: deque[Future[None]] = deque()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for all calls; on an error, cancels those that have not started."""
        try:
            if error[0] is None:
                self.finish()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, call: Callable[[], None]) -> None:
        """Queues `call`, once fewer than `most` are unfinished."""
        self.check()
        while self._most is not None and len(self._calls) >= self._most:
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(call))

    def check(self) -> None:
        """Raises the error of a failed call."""
        while self._calls and self._calls[0].done():
            self._calls.popleft().result()

    def finish(self) -> None:
        """Waits for every call; no more can be submitted."""
        while self._calls:
            self._calls.popleft().result()
        self._pool.shutdown()

    def abandon(self, seconds: float) -> None:
        """Cancels calls that have not started, and waits at most so long for the others."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait([call for call in self._calls if not call.done()], seconds)
