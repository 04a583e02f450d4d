"""Computes items in threads before they are needed, while the caller works on earlier ones."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def computed_ahead(function: Callable[[A], B], items: Iterable[A], *, threads: int) -> Iterator[B]:
    """`function` of each item, in order; with no threads, each is computed when it is asked for.

    Decoding images and cutting them into patches release Python's lock for most of their time. An
    exception is raised at its item. As many items as threads are held at a time.
    """
    if threads < 1:
        yield from map(function, items)
        return
    remaining = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="lookahead") as pool:
        running: deque[Future[B]] = deque(
            pool.submit(function, item) for item in islice(remaining, threads)
        )
        try:
            while running:
                result = running.popleft().result()
                running.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
