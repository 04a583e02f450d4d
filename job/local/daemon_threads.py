"""Work on daemon threads: a job that ends does not wait for them, as it does for an executor's."""

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_started = weakref.WeakSet[threading.Thread]()


def any_runs() -> bool:
    """Whether a thread of these still works. Python's exit handlers may crash beside it."""
    return any(thread.is_alive() for thread in _started)


def start(work: Callable[[], Result], name: str) -> Future[Result]:
    """Starts the work on a thread; the future has what it returns or raises."""
    future = Future[Result]()
    _start(functools.partial(_settle, future, work), name)
    return future


def for_each(
    work: Callable[[Item], Result], items: Sequence[Item], *, threads: int, name: str
) -> list[Result]:
    """What `work` returns for each item, in their order. Raises what it raises for the first."""
    found = [Future[Result]() for _ in items]
    waiting = deque(zip(found, items, strict=True))

    def work_through() -> None:
        with suppress(IndexError):  # from `popleft`, once no item is waiting
            while True:
                future, item = waiting.popleft()
                _settle(future, functools.partial(work, item))

    for _ in range(min(threads, len(items))):
        _start(work_through, name)
    return [future.result() for future in found]


def _start(target: Callable[[], None], name: str) -> None:
    thread = threading.Thread(target=target, name=name, daemon=True)
    _started.add(thread)
    thread.start()


def _settle(future: Future[Result], work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised by `result`
        future.set_exception(error)
