"""Calls that threads make while the one who asked for them goes on."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """A few threads; who asks for a call waits while `most` of them are not done.

    That bounds what waiting calls hold. What one failed with is raised to who asked, at the next
    `submit`, `check` or `finish`: the first in the order in which they were asked for.
    """

    def __init__(self, name: str, *, threads: int = 1, most: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._most = most
        self._asked: deque[Future[None]] = deque()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for all; where an error is on its way out, for none that has not begun."""
        try:
            if error[0] is None:
                self.finish()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, call: Callable[[], None]) -> None:
        """Has `call` made; waits for a place before."""
        self.check()
        while self._most is not None and len(self._asked) >= self._most:
            self._asked.popleft().result()
        self._asked.append(self._pool.submit(call))

    def check(self) -> None:
        """Raises what a call has failed with."""
        while self._asked and self._asked[0].done():
            self._asked.popleft().result()

    def finish(self) -> None:
        """Waits until every call is done; there are no more."""
        while self._asked:
            self._asked.popleft().result()
        self._pool.shutdown()

    def abandon(self, seconds: float) -> None:
        """Begins no further call, and waits so long at most for those that have begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait([call for call in self._asked if not call.done()], seconds)
