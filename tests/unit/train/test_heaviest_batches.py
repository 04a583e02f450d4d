"""The heaviest micro-batches of a training, found in the order of training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.engines.data_timer import DataTimer
from job.train import heaviest_batches as module
from job.train.heaviest_batches import heaviest_batches, planned_batches
from job.train.sampler import DUMMY_ROW, BlockShuffleSampler, DistributedBatchSampler, shuffled
from tests.unit.train.short_training import ROWS, short_training


class Noted:
    """Rows that are their numbers."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, number: int) -> int:
        return number


def train_spec(**settings: Any) -> Any:
    defaults = {"gradient_accumulation_steps": 2, "max_steps": 0, "num_train_epochs": 1.0}
    return SimpleNamespace(**{**defaults, **settings})


@pytest.mark.parametrize(
    "length", [{"max_steps": 3}, {"max_steps": 11}, {"num_train_epochs": 2.5}], ids=str
)
def test_the_planned_batches_are_those_of_training(length: dict[str, Any], tmp_path: Path) -> None:
    trained: list[list[int]] = []

    def collate(rows: list[int]) -> dict[str, Any]:
        trained.append(rows)
        return {
            "input_ids": torch.tensor(rows),
            "counted_tokens": len(rows),
            "tokens": len(rows),
            "images": 0,
        }

    short_training(tmp_path, Noted(), collate, DataTimer(), **length).train()
    batches = DistributedBatchSampler(shuffled(ROWS, 0), 2, micro_batches=2)
    planned = list(planned_batches(batches, train_spec(**length)))
    assert planned == trained[: len(planned)]  # a loader may fetch one that is not trained any more
    assert len(trained) - len(planned) <= 1


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches() -> None:
    batches = DistributedBatchSampler(BlockShuffleSampler(5, [0], 5, seed=1), 2, micro_batches=2)
    planned = list(planned_batches(batches, train_spec(max_steps=4)))
    assert [len(rows) for rows in planned] == [2, 2, 1] * 2
    assert planned[:3] != planned[3:]


def test_those_of_most_tokens_padding_and_patches_are_found() -> None:
    lengths, patches = [9, 9, 12, 1, 2, 8], [0, 0, 0, 0, 40, 32]
    batches = [[0, 1], [2, 3], [4, 3], [5, 3], [0, 1]]
    assert heaviest_batches(batches, lengths, patches) == [[0, 1], [2, 3], [4, 3], [5, 3]]


def test_each_batch_is_found_once_and_a_dummy_row_is_the_first_row() -> None:
    assert heaviest_batches([[1, 0], [DUMMY_ROW]], [3, 4], [0, 0]) == [[1, 0]]
    assert heaviest_batches([[DUMMY_ROW]], [3, 4], [16, 0]) == [[0]]


def test_the_search_of_a_long_training_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    assert heaviest_batches(iter([[0]] * 4 + [[1]]), [3, 4], [0, 0]) == [[0]]
    assert heaviest_batches(iter([[0]] * 3 + [[1]]), [3, 4], [0, 0]) == [[1]]
