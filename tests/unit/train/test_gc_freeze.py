"""Existing objects are frozen from garbage collection while training runs."""

import gc

import pytest

from job.train.gc_freeze import frozen_gc


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
