"""Work on daemon threads: a job that ends does not wait for them, as it does for an executor's."""

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def start(work: Callable[[], Result], name: str) -> Future[Result]:
    """Starts the work on a thread; the future has what it returns or raises."""
    future = Future[Result]()
    threading.Thread(target=_settle, args=(future, work), name=name, daemon=True).start()
    return future


def for_each(
    work: Callable[[Item], Result], items: Sequence[Item], *, threads: int, name: str
) -> list[Result]:
    """What `work` returns for each item, in their order. Raises what it raises for the first."""
    found = [Future[Result]() for _ in items]
    waiting = deque(zip(found, items, strict=True))

    def work_through() -> None:
        with suppress(IndexError):  # of popleft: none is left
            while True:
                future, item = waiting.popleft()
                _settle(future, functools.partial(work, item))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work_through, name=name, daemon=True).start()
    return [future.result() for future in found]


def _settle(future: Future[Result], work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised by `result`
        future.set_exception(error)
