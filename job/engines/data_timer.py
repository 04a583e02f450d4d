"""How long training waits for its batches."""

import time
from collections.abc import Iterator
from typing import Any


class Waiting:
    """A clock that runs while a batch is asked for and not there."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """All that was waited so far, in this process."""

    def of(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time until each of them counts."""
        started = time.monotonic()
        for batch in batches:
            self.seconds += time.monotonic() - started
            yield batch
            started = time.monotonic()
