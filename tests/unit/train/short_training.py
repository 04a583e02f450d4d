"""A training of one weight on 16 rows, in micro-batches of two, two of them per step."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainingArguments

from job.engines.data_timer import DataTimer
from job.engines.trainer import StepTrainer
from job.train.sampler import DistributedBatchSampler, shuffled

ROWS = 16


class Line(torch.nn.Module):
    """A model of one weight, whose FLOPs must not be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(loss=((self.weight * input_ids - 2) ** 2).mean())

    def floating_point_ops(self, inputs: Any) -> int:
        raise AssertionError("walks through all modules")


def short_training(
    directory: Path,
    rows: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    data_timer: DataTimer,
    *,
    trainer: type[StepTrainer] = StepTrainer,
    **arguments: Any,
) -> StepTrainer:
    return trainer(
        batch_sampler=DistributedBatchSampler(shuffled(ROWS, 0), 2, micro_batches=2),
        data_timer=data_timer,
        model=Line(),
        args=TrainingArguments(
            output_dir=str(directory),
            use_cpu=True,
            gradient_accumulation_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=rows,
        data_collator=collate,
    )
