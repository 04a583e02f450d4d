"""One order of rows, however they are divided."""

from itertools import chain

import pytest

from job.train.sampler import DUMMY_ROW, BlockShuffleSampler, DistributedBatchSampler, shuffled


def steps(
    rows: int, width: int, micro_batches: int, processes: int, epoch: int = 0
) -> list[list[int]]:
    """The rows of each optimizer step, over all micro-batches and processes."""
    shares = []
    for process in range(processes):
        batches = DistributedBatchSampler(
            shuffled(rows, 3), width, rank=process, processes=processes
        )
        batches.sampler.set_epoch(epoch)
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
    pieces = [list(chain(*found)) for found in zip(*shares, strict=True)]
    found = [chain(*pieces[i : i + micro_batches]) for i in range(0, len(pieces), micro_batches)]
    return [[row for row in step if row != DUMMY_ROW] for step in found]


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 12, 26])
@pytest.mark.parametrize("divided", [(2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_the_rows_of_every_step_are_those_of_one_process(
    rows: int, divided: tuple[int, int, int]
) -> None:
    assert steps(rows, *divided) == steps(rows, 4, 1, 1)
    assert sorted(chain(*steps(rows, *divided))) == list(range(rows))


def test_each_epoch_has_another_order() -> None:
    assert steps(12, 2, 1, 2, epoch=1) != steps(12, 2, 1, 2, epoch=0)
    assert steps(12, 2, 1, 2, epoch=1) == steps(12, 4, 1, 1, epoch=1)


def test_processes_have_equally_many_batches_and_those_without_rows_get_dummies() -> None:
    first, second = (
        list(DistributedBatchSampler(shuffled(5, 3), 2, rank=process, processes=2))
        for process in range(2)
    )
    assert [len(batch) for batch in first] == [2, 1]
    assert len(second[0]) == 2
    assert second[1] == [DUMMY_ROW]


def test_windows_give_every_row_once_and_shuffle_it_among_its_neighbours() -> None:
    starts, buffer = range(0, 1000, 50), 200
    windows = BlockShuffleSampler(1000, starts, buffer, seed=3)
    order = list(windows)
    assert sorted(order) == list(range(1000))
    assert len(windows) == 1000
    assert list(windows) == order
    for first in range(0, 1000, buffer):
        window = order[first : first + buffer]
        assert len({row // 50 for row in window}) == buffer // 50
        assert window != sorted(window)
    windows.set_epoch(1)
    assert list(windows) != order


@pytest.mark.parametrize("starts", [[0], [0, 0, 3], [3, 9, 12], [0, 1, 2, 11], [4, 4, 8]])
def test_blocks_may_be_of_any_size_or_empty(starts: list[int]) -> None:
    assert sorted(BlockShuffleSampler(12, starts, 1, seed=0)) == list(range(12))


def test_a_buffer_of_all_rows_shuffles_all_of_them_together() -> None:
    order = list(BlockShuffleSampler(1000, range(0, 1000, 50), 1000, seed=3))
    assert len({row // 50 for row in order[:50]}) > 10


def test_the_steps_of_windows_are_divided_as_any_order_is() -> None:
    order = BlockShuffleSampler(60, [0, 20, 40], 20, seed=1)

    def of(width: int, processes: int) -> list[list[list[int]]]:
        return [
            list(DistributedBatchSampler(order, width, rank=rank, processes=processes))
            for rank in range(processes)
        ]

    first, second = of(3, 2)
    [alone] = of(6, 1)
    assert [[*a, *b] for a, b in zip(first, second, strict=True)] == alone
