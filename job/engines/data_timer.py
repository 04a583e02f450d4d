"""Measures how long training waits for its batches."""

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class DataTimer:
    """Runs while the training loop waits for a batch."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Total wait of this process."""

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the wait for each of them is added to `seconds`."""
        started = time.monotonic()
        for batch in batches:
            self.seconds += time.monotonic() - started
            yield batch
            started = time.monotonic()
