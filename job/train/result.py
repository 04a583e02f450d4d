"""The train stage's result, as run.json records it."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from job.distributed import process_group
from job.engines.ways import computing
from job.spec.types import JobSpec
from job.train.adapting import AdaptedModel
from job.train.checkpoint.resume import step_of
from job.train.compile_choice import CompileChoice
from job.train.session import Session
from job.train.train_context import TrainContext
from job.train.training_rows import TrainingRows


@dataclass(frozen=True, kw_only=True)
class Search:
    """How it was decided how to compute a step."""

    fit: dict[str, Any] | None
    """The record of the search for passes that fit; None if there was none."""
    compiling: CompileChoice


@dataclass(frozen=True, kw_only=True)
class ValidationSummary:
    """The validations of a training, as run.json records them."""

    metric: str
    """The one by which they are compared, with the prefix `eval_`."""
    greater_is_better: bool
    best_step: int | None
    """None, as `best`, if no validation gave a finite value."""
    best: float | None
    last_step: int | None
    """The last step that was validated, normally the last one."""
    last: float | None
    best_metrics: dict[str, float]
    last_metrics: dict[str, float]
    exported_step: int
    """The step whose weights are evaluated and exported."""
    stopped_early: bool
    validations: int
    rows: int
    dropped_rows: int
    """Rows over `max_length`, which are not validated."""
    seconds: float
    """Of the validations of this session."""
    share: float
    """The same as a fraction of the training's seconds, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The summary of a training."""

    steps: int
    fit: dict[str, Any] | None
    """The passes that were found, those that were too large, and those that the estimate ruled out;
    None if none were searched."""
    computing: dict[str, Any]
    """How a step was computed: passes, checkpointing, compiled blocks; `auto` is resolved."""
    ways: dict[str, Any]
    """What ran of the ways that were tried before step 1, and what their trials found."""
    captured: dict[str, Any] | None
    """The passes that were captured as graphs; None if they run eagerly."""
    processes: int
    rows_a_step: int
    """Rows of a full step, over all micro-batches and processes."""
    resumed_from_step: int
    epochs: float
    rows: int
    dropped_rows: int
    first_loss: float | None
    """None, as the last, if no step was logged, or the loss is not finite."""
    final_loss: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    tflops: float | None
    """TFLOP/s of each device, by the model's operations; None on a CPU."""
    mfu: float | None
    """The same as a share of the device's bf16 peak, 0 to 1; None if the peak is not known."""
    data_wait_seconds: float
    """Rank 0's mean wait for batches per step, in this session."""
    data_wait_share: float
    """The same as a fraction of `seconds`, 0 to 1."""
    peak_memory_bytes: int
    """Peak during training only, which is what `plan` estimates."""
    trainable_parameters: int
    total_parameters: int
    optim: str
    lora_targets: dict[str, int]
    validation: dict[str, Any] | None
    """See `ValidationSummary`; None if the spec does not validate."""
    learning_rates: dict[str, float]
    """Peak learning rate by group of weights; empty if all have the same."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    context: TrainContext,
    rows: TrainingRows,
    adapted: AdaptedModel,
    session: Session,
    search: Search,
    seconds: float,
    kept: int,
) -> TrainResult:
    """The result, from the history and the trainer's state; `seconds` is the training loop's time.

    `kept` is the step of the stored weights. Speeds are those of this session: steps before a
    resume do not count, nor does the time of validations.
    """
    state = session.trainer.state
    lines = (context.train_directory / "history.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    validating = session.validator.seconds if session.validator else 0.0
    first_step, wait = step_of(session.resumed_from), session.data_timer.seconds
    tokens_before = getattr(session.trainer, "_initial_num_input_tokens_seen", 0)
    tokens_per_second = (state.num_input_tokens_seen - tokens_before) / max(
        seconds - validating, 1e-9
    )
    speed, computed = float(tokens_per_second), session.throughput
    return TrainResult(
        steps=state.global_step,
        fit=search.fit,
        computing=_computing(session.spec, search),
        ways=_ways(context, adapted, session),
        captured=session.captured.to_json() if session.captured else None,
        processes=process_group.size(),
        rows_a_step=rows_per_step(session.spec),
        resumed_from_step=first_step,
        epochs=round(state.epoch or 0.0, 4),
        rows=len(rows.dataset),
        dropped_rows=rows.filtered.dropped,
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
        tokens=state.num_input_tokens_seen,
        seconds=round(seconds, 3),
        tokens_per_second=round(speed, 1),
        tflops=None if computed is None else computed.tflops(speed),
        mfu=None if computed is None else computed.mfu(speed),
        data_wait_seconds=round(wait / max(state.global_step - first_step, 1), 4),
        data_wait_share=round(wait / max(seconds, 1e-9), 4),
        peak_memory_bytes=context.accelerator.peak_memory_bytes(),
        trainable_parameters=adapted.trainable_parameters,
        total_parameters=adapted.total_parameters,
        optim=session.optim,
        lora_targets=adapted.targets,
        validation=_validation(session, seconds, kept),
        learning_rates=session.learning_rates,
    )


def _computing(spec: JobSpec, search: Search) -> dict[str, Any]:
    """How a step was computed, with the settings that `auto` stood for."""
    train, choice = spec.train, search.compiling
    released = choice.compiled and not train.torch_compile
    return {
        "rows_a_pass": train.per_device_train_batch_size,
        "passes_a_step": train.gradient_accumulation_steps,
        "gradient_checkpointing": train.gradient_checkpointing,
        "torch_compile": train.torch_compile,
        "torch_compile_reason": "compiled blocks did not fit or failed to compile"
        if released
        else choice.reason,
    }


def _ways(context: TrainContext, adapted: AdaptedModel, session: Session) -> dict[str, Any]:
    """What ran, and each trial's outcome; grouped products and attention are of padding-free steps
    of models that have them."""
    packed = computing(adapted.base, context.engine) if adapted.padding_free else {}
    return {
        "ran": {
            **packed,
            "passes": "captured" if session.captured else "launched one by one",
            "optimizer": session.optim,
        },
        "tried": [outcome.to_json() for outcome in context.ways.outcomes],
    }


def _validation(session: Session, seconds: float, kept: int) -> dict[str, Any] | None:
    validator, selection = session.validator, session.selection
    if validator is None or selection is None:
        return None
    state = session.trainer.state
    history = state.log_history
    every, best = selection.validations(history), selection.best(history)
    last = every[-1] if every else None
    return asdict(
        ValidationSummary(
            metric=selection.metric,
            greater_is_better=selection.greater_is_better,
            best_step=best.step if best else None,
            best=best.value if best else None,
            last_step=last.step if last else None,
            last=last.value if last and math.isfinite(last.value) else None,
            best_metrics=dict(best.metrics) if best else {},
            last_metrics={k: v for k, v in last.metrics.items() if math.isfinite(v)}
            if last
            else {},
            exported_step=kept,
            stopped_early=selection.stops(history) and state.global_step < state.max_steps,
            validations=len(every),
            rows=len(validator.rows),
            dropped_rows=validator.rows.dropped,
            seconds=round(validator.seconds, 3),
            share=round(validator.seconds / max(seconds, 1e-9), 4),
        )
    )


def rows_per_step(spec: JobSpec) -> int:
    return spec.train.rows_a_step * process_group.size()
