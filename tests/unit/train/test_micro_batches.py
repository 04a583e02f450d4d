"""The rows of a step split by length: the same rows, in micro-batches of similar size."""

from collections.abc import Callable
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.train.micro_batches import Split, balanced, in_order, sorted_by_length
from job.train.sampler import DUMMY_ROW, DistributedBatchSampler, shuffled

Grouped = Callable[[int, list[int]], Split]


def image_patches(lengths: list[int]) -> list[int]:
    """Patches of each row, of which a short one may have more than a long one."""
    return [4 * (37 * length % (length + 1)) for length in lengths]


def packed(size: int, lengths: list[int]) -> Split:
    return balanced(size, lengths, image_patches(lengths))


SPLITS: tuple[Grouped, ...] = (packed, sorted_by_length)
DIVIDED = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
"""Rows per micro-batch, micro-batches and processes: four rows per step."""

every_split = pytest.mark.parametrize("grouped", SPLITS)
sizes = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def steps(
    lengths: list[int], width: int, micro_batches: int, processes: int, grouped: Grouped | None
) -> list[list[list[int]]]:
    """Every step's micro-batches, over all processes."""
    shares = []
    for process in range(processes):
        batches = DistributedBatchSampler(
            shuffled(len(lengths), 3),
            width,
            micro_batches=micro_batches,
            rank=process,
            processes=processes,
            split=grouped(width, lengths) if grouped else None,
        )
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
    together = list(chain.from_iterable(zip(*shares, strict=True)))
    at_once = micro_batches * processes
    return [together[i : i + at_once] for i in range(0, len(together), at_once)]


def rows_of(step: list[list[int]]) -> list[int]:
    return sorted(row for row in chain(*step) if row != DUMMY_ROW)


@every_split
@settings(deadline=None)
@given(lengths=sizes, divided=st.sampled_from(DIVIDED))
def test_the_rows_of_every_step_are_those_of_the_plain_order(
    grouped: Grouped, lengths: list[int], divided: tuple[int, int, int]
) -> None:
    plain = steps(lengths, 4, 1, 1, None)
    found = steps(lengths, *divided, grouped)
    assert [rows_of(step) for step in found] == [rows_of(step) for step in plain]
    for batch in chain(*found):
        assert batch == [DUMMY_ROW] or (batch and DUMMY_ROW not in batch)


@every_split
@settings(deadline=None)
@given(lengths=sizes, width=st.integers(1, 5), micro_batches=st.integers(1, 4))
def test_no_micro_batch_is_larger_than_the_largest_rows_together(
    grouped: Grouped, lengths: list[int], width: int, micro_batches: int
) -> None:
    patches = image_patches(lengths)
    longest, most = sorted(lengths)[-width:], sum(sorted(patches)[-width:])
    for batch in chain(*steps(lengths, width, micro_batches, 2, grouped)):
        rows = [row for row in batch if row != DUMMY_ROW]
        own = [lengths[row] for row in rows] or [0]
        assert sum(own) <= sum(longest)
        assert len(own) * max(own) <= width * max(longest)
        assert sum(patches[row] for row in rows) <= most


@every_split
@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=24, max_size=24))
def test_two_processes_have_the_micro_batches_of_one(grouped: Grouped, lengths: list[int]) -> None:
    one, two = steps(lengths, 3, 4, 1, grouped), steps(lengths, 3, 2, 2, grouped)
    assert [sorted(step) for step in one] == [sorted(step) for step in two]


@every_split
@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=24, max_size=24))
def test_every_micro_batch_of_a_whole_step_has_a_row(grouped: Grouped, lengths: list[int]) -> None:
    for batch in chain(*steps(lengths, 2, 3, 2, grouped)):
        assert batch
        assert batch != [DUMMY_ROW]


def test_packed_micro_batches_have_about_equally_many_tokens() -> None:
    lengths = [100, 90, 20, 20, 20, 10, 10, 10]
    assert balanced(4, lengths, [0] * 8)(range(8), 2, 1) == [[0, 3, 5, 6], [1, 2, 4, 7]]
    plain = in_order(4)(range(8), 2, 1)
    assert [sum(lengths[row] for row in piece) for piece in plain] == [230, 50]


def test_a_long_row_is_not_padded_with_many_short_ones() -> None:
    lengths = [100, 50, *[1] * 10]
    for piece in balanced(6, lengths, [0] * 12)(range(12), 2, 1):
        own = [lengths[row] for row in piece]
        assert len(own) * max(own) <= 6 * 100


def test_rows_of_padded_micro_batches_have_similar_lengths() -> None:
    lengths = [5, 90, 7, 80, 6, 70, 8, 60]
    assert sorted_by_length(2, lengths)(range(8), 4, 1) == [[1, 3], [5, 7], [6, 2], [4, 0]]


def test_no_process_has_the_longest_rows_of_every_micro_batch() -> None:
    lengths = [80, 70, 60, 50, 40, 30, 20, 10]
    pieces = sorted_by_length(2, lengths)(range(8), 2, 2)
    assert pieces == [[0, 1], [2, 3], [6, 7], [4, 5]]
