"""Python's garbage collector during training."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_gc() -> Iterator[None]:
    """Freezes existing objects from garbage collection.

    A full collection scans about a million objects (model, rows, libraries) in half a second, while
    the device is idle, and frees none of them before training ends. If the process has frozen
    objects already, as one that is forked from a server of libraries, all stay frozen: what was
    frozen when cannot be told apart, and a process that was forked would copy what it scans.
    """
    frozen_before = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()
