"""A training whose weights are no longer finite ends, and does not store them."""

from typing import Any

import pytest
import torch

from benchmarks.training import formula_rows, tiny_family, train_stage
from job.engines.device import detect
from job.engines.trainer import StepTrainer
from job.errors import SpecError
from job.train.callbacks.checkpoint import CheckpointCallback
from tests.unit.train.test_capturing import spec_with


@pytest.mark.parametrize(
    ("logging_steps", "ends_after"), [(1, 2), (100, 3)], ids=["at the log", "before it is stored"]
)
def test_weights_that_are_not_finite_end_the_training_and_are_not_stored(
    monkeypatch: pytest.MonkeyPatch, logging_steps: int, ends_after: int
) -> None:
    step, stored = StepTrainer.train_step, list[Any]()

    def broken_after_the_first(self: StepTrainer, *args: Any, **more: Any) -> None:
        step(self, *args, **more)
        if self.state.global_step == 1:
            weight = next(each for each in self.model.parameters() if each.requires_grad)
            torch.nn.init.constant_(weight, torch.nan)

    monkeypatch.setattr(StepTrainer, "train_step", broken_after_the_first)
    monkeypatch.setattr(CheckpointCallback, "on_save", lambda *_, **__: stored.append(1))
    spec = spec_with(
        "train.max_steps=3", "train.save_steps=3", f"train.logging_steps={logging_steps}"
    )
    family, accelerator = tiny_family(spec), detect(spec.runtime)
    model = family.initialize(seed=0, dtype=torch.float32, device=accelerator.device)
    with pytest.raises(SpecError) as caught:
        train_stage(spec, accelerator, family, model, list(formula_rows(12)))
    [problem] = caught.value.problems
    assert problem.field == "$.train.learning_rate"
    assert f"no longer finite after step {ends_after}" in problem.message
    assert problem.fix is not None
    assert "lower it, or raise train.warmup_steps" in problem.fix
    assert not stored
