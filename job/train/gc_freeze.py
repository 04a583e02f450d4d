"""Python's collector of reference cycles, while steps are on their way to the device."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def spared() -> Iterator[None]:
    """Within, the collector leaves alone what is there already.

    To walk through a model, its rows and the libraries, a million objects, takes half a second, in
    which the device runs out of work; and none of it is given up before training ends.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
