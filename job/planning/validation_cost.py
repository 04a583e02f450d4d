"""Estimates how often a training validates, and what it costs."""

import math

from job.planning import facts
from job.spec.types import JobSpec

FORWARD_SHARE = 1 / 3
"""The forward pass's share of a training step: the backward pass takes twice as long."""


def validation(
    spec: JobSpec, data: facts.Data, steps: facts.Steps, time: facts.TrainingTime | None
) -> facts.Validation | None:
    """The validations of a training; None if the spec has none."""
    train = spec.train
    if not train.validates:
        return None
    rows, times = _rows(spec, data), _times(spec, steps)
    share: float | None = None
    seconds: tuple[float, float] | None = None
    if times and steps.total is not None:
        step_rows = steps.rows_a_step * steps.processes  # which share the rows to validate on too
        share = FORWARD_SHARE * times * rows / (steps.total * step_rows)
        if time is not None:
            shortest, longest = (
                round(share * whole / times, 1) for whole in (time.shortest, time.longest)
            )
            seconds = shortest, longest
    return facts.Validation(
        rows=rows,
        times=times,
        metric=f"eval_{train.best_metric}",
        answers=train.generates_answers,
        share=None if share is None else round(share, 4),
        seconds=seconds,
    )


def _rows(spec: JobSpec, data: facts.Data) -> int:
    """The rows of one validation, at most."""
    most, source = spec.eval.validation_samples, spec.data.validation
    if data.validation_rows is not None:
        return min(most, max(1, data.validation_rows))
    return most if source is None or source.limit is None else min(most, source.limit)


def _times(spec: JobSpec, steps: facts.Steps) -> int | None:
    if spec.train.eval_strategy == "steps" and steps.total is not None:
        return math.ceil(steps.total / spec.train.validation_steps)
    return None if steps.epochs is None else math.ceil(steps.epochs)
