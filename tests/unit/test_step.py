"""What the trainer does between passes: nothing for which the device would be waited for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from job.engines.step import StepTrainer
from job.engines.waiting import Waiting
from job.families.base import COUNTED, TOKENS
from job.train.order import SharedBatches, shuffled


class Line(torch.nn.Module):
    """A model of one weight, whose operations nobody is to count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(loss=((self.weight * input_ids - 2) ** 2).mean())

    def floating_point_ops(self, inputs: Any) -> int:
        raise AssertionError("walks through all modules")


@pytest.fixture
def trainer(tmp_path: Path) -> StepTrainer:
    """Of 16 rows, two a pass and two passes a step; row n has n tokens."""
    return StepTrainer(
        batches=SharedBatches(shuffled(16, 0), 2, passes=2),
        waiting=Waiting(),
        model=Line(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
        ),
        train_dataset=list(range(16)),
        data_collator=lambda rows: {
            "input_ids": torch.tensor(rows, dtype=torch.float),
            COUNTED: len(rows),
            TOKENS: sum(rows),
        },
    )


def test_tokens_are_counted_on_the_host_and_operations_not_at_all(
    trainer: StepTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(_: Any) -> Any:
        raise AssertionError("waits for the device")

    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 2 * sum(range(16))


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
