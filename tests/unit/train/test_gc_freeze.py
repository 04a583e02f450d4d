"""Existing objects are frozen from garbage collection while training runs."""

import gc
from collections.abc import Iterator

import pytest

from job.train.gc_freeze import frozen_gc


@pytest.fixture(autouse=True)
def _frozen_afterwards_as_before() -> Iterator[None]:
    """These tests begin with nothing frozen."""
    frozen_before = gc.get_freeze_count() > 0
    gc.unfreeze()
    yield
    gc.unfreeze()
    if frozen_before:
        gc.freeze()


def _stopped(counts: list[int]) -> None:
    with frozen_gc():
        counts.append(gc.get_freeze_count())
        raise KeyboardInterrupt


def test_what_is_there_is_left_alone_and_given_back() -> None:
    counts: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        _stopped(counts)
    assert counts[0] > 0
    assert gc.get_freeze_count() == 0


def test_what_the_process_had_frozen_before_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with frozen_gc():
        pass
    assert gc.get_freeze_count() >= frozen - 100 > 0  # less what was freed meanwhile
