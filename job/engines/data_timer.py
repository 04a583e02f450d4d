"""Measures how long training waits for its batches."""

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class DataTimer:
    """Adds up the time that the training loop waits for batches."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Total wait of this process so far."""

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the same batches, and adds the wait for each to `seconds`."""
        started = time.monotonic()
        for batch in batches:
            self.seconds += time.monotonic() - started
            yield batch
            started = time.monotonic()
