"""What the trainer does between passes: nothing for which the device would be waited for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from job.engines.data_timer import DataTimer
from job.engines.trainer import StepTrainer
from job.families.base import COUNTED, TOKENS
from tests.unit.train.short_training import ROWS, short_training


@pytest.fixture
def trainer(tmp_path: Path) -> StepTrainer:
    """Row n has n tokens."""
    return short_training(
        tmp_path,
        list(range(ROWS)),
        lambda rows: {
            "input_ids": torch.tensor(rows, dtype=torch.float),
            COUNTED: len(rows),
            TOKENS: sum(rows),
        },
        DataTimer(),
        num_train_epochs=2,
        include_num_input_tokens_seen="non_padding",
    )


def test_tokens_are_counted_on_the_host_and_operations_not_at_all(
    trainer: StepTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(_: Any) -> Any:
        raise AssertionError("waits for the device")

    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 2 * sum(range(ROWS))


def test_batches_are_copied_while_the_device_computes(
    trainer: StepTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[bool] = []
    to: Any = torch.Tensor.to

    def noted(tensor: Any, *given: Any, non_blocking: bool = False, **more: Any) -> Any:
        copied.append(non_blocking)
        return to(tensor, *given, non_blocking=non_blocking, **more)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    assert len(list(trainer.get_train_dataloader())) == 8
    assert copied == [True] * 8
