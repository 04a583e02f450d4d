"""How long training waits for its batches."""

import time
from collections.abc import Iterator
from typing import Any


class Waiting:
    """A clock that runs while a batch is waited for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """In all, so far."""

    def of(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, the time until each of them counted."""
        while True:
            started = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.seconds += time.monotonic() - started
            yield batch
