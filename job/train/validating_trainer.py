"""A trainer that validates: during training, and once more if a stop came before a validation.

Transformers asks `_evaluate` for metrics where a callback has requested an evaluation
(`job.train.callbacks.validation_schedule`), then `_determine_best_metric`, then saves if requested.
All processes get the same metrics, so they decide alike.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import log, signals
from job.distributed import process_group
from job.spec.types import TrainSpec
from job.train.callbacks.validation_schedule import is_due
from job.train.checkpoint.contents import STATE
from job.train.checkpoint.safetensors_trainer import SafetensorsTrainer
from job.train.divergence import require_finite
from job.train.selection import Selection
from job.train.validation import Validator

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ValidationPlan:
    """How a training validates, and what follows from it."""

    spec: TrainSpec
    validator: Validator
    selection: Selection

    @classmethod
    def of(cls, spec: TrainSpec, validator: Validator | None) -> "ValidationPlan | None":
        """The plan of the spec; None without a validator, if the spec does not validate."""
        if validator is None:
            return None
        return cls(spec=spec, validator=validator, selection=Selection.of(spec))


class ValidatingTrainer(SafetensorsTrainer):
    """Validates, saves the best model so far, and stops early; without a plan, does none of it.

    Ends if the weights are not finite, and stores none that are not.
    """

    section = "train"
    """Of the spec, with the training's settings."""

    def __init__(self, *args: object, plan: ValidationPlan | None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._plan = plan
        self.stopped_early = False
        if plan is not None:
            self.add_callback(_AtResume(self))

    def _evaluate(
        self, trial: None, ignore_keys_for_eval: None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Validates; returns no metrics if it is interrupted by a stop, which it then requests."""
        assert self._plan is not None
        result = self._plan.validator(self.model)
        if result is None:
            if signals.received() is None:
                signals.relay()
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}
        metrics = {**result.metrics, "eval_seconds": round(result.seconds, 3)}
        self.log(dict(metrics))  # it adds keys to what it is given
        # Before the best metric is updated: callbacks compare with the best one so far.
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _determine_best_metric(self, metrics: Mapping[str, float], trial: None) -> bool:
        """Whether the validation is the best so far; requests a checkpoint if it must be kept."""
        if not metrics:
            return False
        assert self._plan is not None
        plan, history = self._plan, self.state.log_history
        best = plan.selection.best(history)
        is_best = best is not None and best.step == self.state.global_step
        if best is not None:
            self.state.best_metric, self.state.best_global_step = best.value, best.step
        if is_best and plan.spec.load_best_model_at_end:
            self.control.should_save = True
        self._stop_early()
        return is_best

    def _stop_early(self) -> None:
        assert self._plan is not None
        selection, history = self._plan.selection, self.state.log_history
        if not selection.stops(history) or self.state.global_step >= self.state.max_steps:
            return
        self.stopped_early = True
        self.control.should_training_stop = True
        self.control.should_save = True  # the last step is always saved
        if process_group.rank() == 0:
            best = selection.best(history)
            log.info(
                "training stops early: no improvement",
                step=log.fraction(self.state.global_step, self.state.max_steps),
                validations=selection.without_improvement(history),
                metric=selection.metric,
                **({} if best is None else {"best": best.value, "best_step": best.step}),
            )

    def validate_if_missed(self) -> None:
        """Validates the step of the checkpoint that training resumes from, if a stop came first.

        Also ends the training if it had stopped early at that step.
        """
        assert self._plan is not None
        state, plan = self.state, self._plan
        if state.global_step == 0 or state.global_step <= plan.selection.since:
            return
        validated = any(
            each.step == state.global_step for each in plan.selection.validations(state.log_history)
        )
        if is_due(plan.spec, state) and not validated:
            self._determine_best_metric(self._evaluate(None, None), None)
        elif validated:
            self._stop_early()
        self.control.should_save = False  # the checkpoint is there

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            self.require_finite()

    def require_finite(self) -> None:
        """Raises SpecError if the training has diverged; all processes have to call it."""
        require_finite(self.model, self.args, step=self.state.global_step, section=self.section)

    def _save_checkpoint(self, model: "torch.nn.Module", trial: None) -> None:
        self.require_finite()
        super()._save_checkpoint(model, trial)
        if self.state.best_model_checkpoint is not None:
            # A local path, which nothing reads: the best step's number identifies its checkpoint.
            self.state.best_model_checkpoint = None
            if self.args.should_save:
                name = f"checkpoint-{self.state.global_step}"
                self.state.save_to_json(str(Path(self.args.output_dir, name, STATE)))


class _AtResume(TrainerCallback):
    """Once training begins, which is when the other callbacks are ready."""

    def __init__(self, trainer: ValidatingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        self._trainer.validate_if_missed()
        return self._trainer.control


def log_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The trainer's log in a checkpoint."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    history: list[dict[str, Any]] = state["log_history"]
    return history
