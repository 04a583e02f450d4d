"""Shows and records progress: loss, learning rate, tokens per second, memory, time left."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import log, telemetry
from job.engines.data_timer import DataTimer
from job.engines.device import Accelerator
from job.engines.trainer import RATE_PREFIX

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
    ) -> None:
        self._accelerator, self._history = accelerator, history
        self._report_step, self._data_timer = report_step, data_timer
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
        known = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        earlier = [
            {**{k: e[k] for k in known if k in e}, **_learning_rates(e)}
            for e in state.log_history
            if "loss" in e
        ]
        with self._history.open("w", encoding="utf-8") as lines:
            for entry in earlier:
                lines.write(json.dumps({**entry, "epoch": round(entry["epoch"], 4)}) + "\n")
        left = state.max_steps - state.global_step
        self._bar = self._stack.enter_context(log.progress("train", left, "steps"))
        self._started = time.monotonic()
        self._logged = Mark(step=state.global_step, at=self._started, waited=0.0)
        self._tokens_at_log = state.num_input_tokens_seen

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
        with self._history.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        self._report_step(step)
        self._show(step)
        self._warn_of_slow_data(mark, args.dataloader_num_workers)

    def _measure(self, state: TrainerState, logs: dict[str, Any], mark: Mark) -> telemetry.Step:
        """The step, with speeds since the previous log."""
        now = mark.at
        tokens = state.num_input_tokens_seen - self._tokens_at_log
        done = state.global_step - self._first_step
        left = (state.max_steps - state.global_step) * (now - self._started) / max(done, 1)
        return telemetry.Step(
            step=state.global_step,
            steps=state.max_steps,
            epoch=round(state.epoch or 0.0, 4),
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            **_learning_rates(logs),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            tokens_per_second=round(tokens / max(now - self._logged.at, 1e-9), 1),
            data_wait_seconds=round(mark.wait_per_step(self._logged), 4),
            data_wait_share=round(mark.wait_share(self._logged), 4),
            memory_bytes=self._accelerator.peak_memory_bytes(),
            seconds=round(now - self._started, 3),
            left_seconds=round(left, 3),
        )

    def _show(self, step: telemetry.Step) -> None:
        """Logs a line; on a terminal, updates the bar at its next step instead."""
        if not log.on_terminal():
            log.info(
                "train",
                step=log.fraction(step.step, step.steps),
                loss=step.loss,
                learning_rate=step.learning_rate,
                tokens_per_second=step.tokens_per_second,
                data_wait_share=step.data_wait_share,
                memory=log.byte_count(step.memory_bytes),
                left=log.seconds(step.left_seconds),
            )
        self._shown = {
            "loss": step.loss,
            "lr": step.learning_rate,
            "tok/s": step.tokens_per_second,
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
