"""The time that each part of the export takes, for the log and `export.json`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    def __init__(self) -> None:
        self._started = time.monotonic()
        self.seconds: dict[str, float] = {}
        """By part, in order."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - started, 3)

    @property
    def total(self) -> float:
        """Seconds since it was started."""
        return round(time.monotonic() - self._started, 3)
