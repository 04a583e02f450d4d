"""Shows and records progress: loss, learning rate, tokens per second, memory, time left."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import log, telemetry
from job.engines.data_timer import DataTimer
from job.engines.device import Accelerator
from job.engines.trainer import RATE_PREFIX
from job.redaction import as_json
from job.train.selection import Log, Measured, Selection
from job.train.throughput import Throughput, shown_throughput

NOT_IN_HISTORY = ("steps", "left_seconds")
"""Fields of a step that are redundant once training has ended."""

SLOW_DATA, WINDOW = 0.2, 20
"""Warns if more than this share of the time of this many steps is spent waiting for data."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point in time: the step, the clock, and the total wait for batches so far."""

    step: int
    at: float
    waited: float

    def wait_per_step(self, before: "Mark") -> float:
        """Seconds of waiting per step since an earlier mark."""
        return (self.waited - before.waited) / max(self.step - before.step, 1)

    def wait_share(self, before: "Mark") -> float:
        """The share of time spent waiting since an earlier mark, 0 to 1."""
        return (self.waited - before.waited) / max(self.at - before.at, 1e-9)


def _learning_rates(logs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`learning_rates` by group of weights, as `StepTrainer` logs them; empty if there are none."""
    rates = {k.removeprefix(RATE_PREFIX): float(v) for k, v in logs.items() if RATE_PREFIX in k}
    return {"learning_rates": rates} if rates else {}


class ProgressCallback(TrainerCallback):
    """A progress bar on a terminal, log lines elsewhere, and `history.jsonl` for the report."""

    def __init__(
        self,
        accelerator: Accelerator,
        history: Path,
        report_step: Callable[[telemetry.Step], None],
        data_timer: DataTimer,
        *,
        report_validation: Callable[[telemetry.Validation], None] | None = None,
        selection: Selection | None = None,
        throughput: Throughput | None = None,
    ) -> None:
        """`selection` compares validations; None if there are none.

        `throughput` tells what tokens take to compute; None if that is not shown.
        """
        self._throughput = throughput
        self._accelerator, self._history = accelerator, history
        self._report_step, self._data_timer = report_step, data_timer
        self._report_validation, self._selection = report_validation, selection
        self._validating = 0.0
        self._stack = ExitStack()
        self._bar: log.Progress | None = None
        self._started = 0.0
        self._tokens_at_log = 0
        self._first_step = 0
        self._logged = Mark(step=0, at=0.0, waited=0.0)
        self._window: Mark | None = None
        self._warned = False
        self._shown: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._first_step = state.global_step
        # Steps before a resume are restored from the Trainer's log: this may be another machine.
        with self._history.open("w", encoding="utf-8") as lines:
            for entry in filter(None, map(_of_history, state.log_history)):
                lines.write(as_json({**entry, "epoch": round(entry["epoch"], 4)}) + "\n")
        left = state.max_steps - state.global_step
        self._bar = self._stack.enter_context(log.progress("train", left, "steps"))
        self._started = time.monotonic()
        self._logged = Mark(step=state.global_step, at=self._started, waited=0.0)
        self._tokens_at_log = state.num_input_tokens_seen
        self._report_earlier(state.log_history)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        mark = Mark(step=state.global_step, at=time.monotonic(), waited=self._data_timer.seconds)
        step = self._measure(state, logs, mark)
        self._logged, self._tokens_at_log = mark, state.num_input_tokens_seen
        record = {
            key: value
            for key, value in asdict(step).items()
            if key not in NOT_IN_HISTORY and value is not None
        }
        self._append(record)
        self._report_step(step)
        self._show(step, state.log_history)
        self._warn_of_slow_data(mark, args.dataloader_num_workers)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: object,
    ) -> None:
        assert self._selection is not None
        best = self._selection.best(state.log_history)
        seconds = metrics["eval_seconds"]
        validation = validation_of(
            {"step": state.global_step, "epoch": state.epoch or 0.0, **metrics}, best
        )
        self._append({"step": validation.step, "epoch": validation.epoch, **validated(metrics)})
        # Speeds are those of training.
        self._validating += seconds
        self._logged = replace(self._logged, at=self._logged.at + seconds)
        if self._report_validation is not None:
            self._report_validation(validation)
        elapsed = time.monotonic() - self._started
        log.info(
            "validation",
            step=log.fraction(state.global_step, state.max_steps),
            **validation.metrics,
            **_shown_best(self._selection.metric, best),
            took=log.seconds(seconds),
            share=f"{self._validating / max(elapsed, 1e-9):.1%}",
        )
        self._shown |= self._shown_validation(state.log_history)

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._history.open("a", encoding="utf-8") as lines:
            lines.write(as_json(record) + "\n")

    def _report_earlier(self, history: Log) -> None:
        """Reports the best and the last validation before a resume, for those who watch."""
        if self._selection is None or self._report_validation is None:
            return
        best = self._selection.best(history)
        every = {e["step"]: e for e in history if self._selection.metric in e}
        known = [each.step for each in self._selection.validations(history)]
        for step in dict.fromkeys([*([best.step] if best else []), *known[-1:]]):
            self._report_validation(validation_of(every[step], best))

    def _shown_validation(self, history: Log) -> dict[str, Any]:
        """The last validation and the best so far, for the bar."""
        if self._selection is None or not (known := self._selection.validations(history)):
            return {}
        best = self._selection.best(history)
        at = {} if best is None else {"best": f"{log.number(best.value)} at {best.step}"}
        return {self._selection.metric: known[-1].value, **at}

    def _measure(self, state: TrainerState, logs: dict[str, Any], mark: Mark) -> telemetry.Step:
        """The step, with speeds since the previous log."""
        now = mark.at
        tokens = state.num_input_tokens_seen - self._tokens_at_log
        done = state.global_step - self._first_step
        left = (state.max_steps - state.global_step) * (now - self._started) / max(done, 1)
        speed = tokens / max(now - self._logged.at, 1e-9)
        computed = self._throughput
        return telemetry.Step(
            step=state.global_step,
            steps=state.max_steps,
            epoch=round(state.epoch or 0.0, 4),
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            **_learning_rates(logs),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            tokens_per_second=round(speed, 1),
            tflops=None if computed is None else computed.tflops(speed),
            mfu=None if computed is None else computed.mfu(speed),
            data_wait_seconds=round(mark.wait_per_step(self._logged), 4),
            data_wait_share=round(mark.wait_share(self._logged), 4),
            memory_bytes=self._accelerator.peak_memory_bytes(),
            seconds=round(now - self._started, 3),
            left_seconds=round(left, 3),
        )

    def _show(self, step: telemetry.Step, history: Log) -> None:
        """Logs a line; on a terminal, updates the bar at its next step instead."""
        if not log.on_terminal():
            log.info(
                "train",
                step=log.fraction(step.step, step.steps),
                loss=step.loss,
                learning_rate=step.learning_rate,
                tokens_per_second=step.tokens_per_second,
                **shown_throughput(step.tflops, step.mfu),
                data_wait_share=step.data_wait_share,
                memory=log.byte_count(step.memory_bytes),
                left=log.seconds(step.left_seconds),
            )
        self._shown = {
            "loss": step.loss,
            **self._shown_validation(history),
            "lr": step.learning_rate,
            "tok/s": step.tokens_per_second,
            **({} if step.mfu is None else {"MFU": f"{step.mfu:.0%}"}),
            "mem": log.size(step.memory_bytes),
        }
        if step.data_wait_share > SLOW_DATA:
            self._shown["waits for data"] = f"{step.data_wait_share:.0%}"

    def _warn_of_slow_data(self, mark: Mark, workers: int) -> None:
        """Warns once. Steps before the first log do not count, because workers start then."""
        start = self._window = self._window or mark
        if self._warned or mark.step - start.step < WINDOW:
            return
        share, self._window = mark.wait_share(start), mark
        if share > SLOW_DATA:
            self._warned = True
            log.warn(
                "data loading is the bottleneck",
                share=f"{share:.0%}",
                steps=f"{start.step + 1}-{mark.step}",
                fix=f"raise train.dataloader_num_workers, now {workers}, "
                "up to the number of cores that the job may use",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if self._bar is not None and log.on_terminal():
            self._bar.advance(1, **self._shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the bar; also called if training fails."""
        self._stack.close()


def validation_of(entry: Mapping[str, Any], best: Measured | None) -> telemetry.Validation:
    """The validation of an entry of the Trainer's log."""
    metrics = {key: value for key, value in entry.items() if key.startswith("eval_")}
    seconds = float(metrics.pop("eval_seconds", 0.0))
    return telemetry.Validation(
        step=entry["step"],
        epoch=round(entry["epoch"], 4),
        metrics=metrics,
        seconds=seconds,
        best=best is not None and best.step == entry["step"],
    )


def _shown_best(metric: str, best: Measured | None) -> dict[str, Any]:
    return {} if best is None else {f"best_{metric}": best.value, "best_step": best.step}


def _of_history(entry: dict[str, Any]) -> dict[str, Any] | None:
    """What the history has of an entry of the Trainer's log: steps and validations."""
    if "loss" in entry:
        known = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        return {**{key: entry[key] for key in known if key in entry}, **_learning_rates(entry)}
    measured = validated(entry)
    return {"step": entry["step"], "epoch": entry["epoch"], **measured} if measured else None


def validated(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A validation's values, in the order in which a resume reads them back."""
    return {key: value for key, value in sorted(entry.items()) if key.startswith("eval_")}
