"""Requests validations at the steps that the spec names."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.spec.types import TrainSpec


class ValidationSchedule(TrainerCallback):
    """Must be called before `StopCallback`, which drops the request if the job must stop."""

    def __init__(self, spec: TrainSpec) -> None:
        self._spec = spec

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        control.should_evaluate = is_due(self._spec, state)


def is_due(spec: TrainSpec, state: TrainerState) -> bool:
    """Whether there is a validation after the current step; always after the last one."""
    if state.global_step >= state.max_steps:
        return True
    if spec.eval_strategy == "steps":
        return state.global_step % spec.validation_steps == 0
    return float(state.epoch or 0.0).is_integer()
