"""One order of rows, however they are divided."""

from itertools import chain

import pytest

from job.train.order import SPARE, SharedBatches


def steps(rows: int, width: int, passes: int, processes: int, epoch: int = 0) -> list[list[int]]:
    """The rows of each optimizer step, over all forward passes and processes."""
    shares = []
    for process in range(processes):
        batches = SharedBatches(rows, width, seed=3, process=process, processes=processes)
        batches.sampler.set_epoch(epoch)
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
    pieces = [list(chain(*found)) for found in zip(*shares, strict=True)]
    found = [chain(*pieces[i : i + passes]) for i in range(0, len(pieces), passes)]
    return [[row for row in step if row != SPARE] for step in found]


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


def test_processes_have_equally_many_batches_and_those_without_rows_keep_step() -> None:
    first, second = (
        list(SharedBatches(5, 2, seed=3, process=process, processes=2)) for process in range(2)
    )
    assert [len(batch) for batch in first] == [2, 1]
    assert len(second[0]) == 2
    assert second[1] == [SPARE]
