"""Shows and records the stage's progress: rewards, entropy, tokens a second, time left."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import log, telemetry
from job.engines.device import Accelerator
from job.redaction import as_json
from job.train.callbacks.progress import validated, validation_of
from job.train.selection import Selection

if TYPE_CHECKING:
    from job.reinforce.trainer import ReinforceTrainer

HISTORY, SAMPLES = "history.jsonl", "samples.jsonl"
EQUAL_STEPS = 20
"""Steps without any difference between the rewards of a row's answers before the log warns."""
NOTHING_LEARNED = (
    "add a reward that tells degrees, such as character_accuracy; raise "
    "reinforce.temperature or reinforce.num_generations; or train longer before"
)
"""How to fix a training in which no rewards differ."""

# Names in the history, by TRL's.
_NAMES = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "equal_groups",
    "entropy": "entropy",
    "kl": "kl",
    "completions/mean_length": "answer_tokens",
    "completions/clipped_ratio": "cut_short",
    "clip_ratio/region_mean": "clipped",
}


def step_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the history has of a logged step: rewards by name, and the share of groups whose answers
    all had the same reward (`equal_groups`), which teach nothing."""
    known = ("step", "loss", "learning_rate", "grad_norm")
    found = {name: entry[name] for name in known if name in entry}
    found |= {
        ours: entry[theirs]
        for theirs, ours in _NAMES.items()
        # No entropy is known of a step without a pass to learn from.
        if entry.get(theirs) is not None
    }
    rewards = {
        name.split("/")[1]: value
        for name, value in sorted(entry.items())  # a resume reads them back in this order
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    return {**found, "rewards": rewards}


def history_of(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps and validations of the trainer's log."""
    found = []
    for entry in entries:
        if "loss" in entry:
            found.append(step_of(entry))
        elif measured := validated(entry):
            found.append({"step": entry["step"], **measured})
    return found


class ReinforceProgress(TrainerCallback):
    """A progress bar on a terminal, log lines elsewhere, `history.jsonl` and `samples.jsonl`."""

    def __init__(
        self,
        accelerator: Accelerator,
        directory: Path,
        report_step: Callable[[telemetry.Step], None],
        report_validation: Callable[[telemetry.Validation], None],
        selection: Selection | None,
    ) -> None:
        self.trainer: ReinforceTrainer | None = None
        """Set once it is built."""
        self._accelerator, self._directory = accelerator, directory
        self._report_step, self._report_validation = report_step, report_validation
        self._selection = selection
        self._stack = ExitStack()
        self._bar: log.Progress | None = None
        self._started = 0.0
        self._first_step = 0
        self._tokens = 0
        self._logged = 0.0
        self._equal_steps = 0
        """Steps since rewards last differed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / SAMPLES).touch()
        self._write(state)
        self._first_step = state.global_step
        self._started = self._logged = time.monotonic()
        self._tokens = state.num_input_tokens_seen
        left = state.max_steps - state.global_step
        self._bar = self._stack.enter_context(log.progress("reinforce", left, "steps"))

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
        entry = step_of({**logs, "step": state.global_step})
        step = self._measured(state, entry)
        self._write(state)
        self._report_step(step)
        if not log.on_terminal():
            log.info(
                "reinforce",
                step=log.fraction(step.step, step.steps),
                **{k: v for k, v in entry.items() if k not in ("step", "rewards", "grad_norm")},
                **{f"{name}_reward": value for name, value in entry["rewards"].items()},
                tokens_per_second=step.tokens_per_second,
                memory=log.byte_count(step.memory_bytes),
                left=log.seconds(step.left_seconds),
            )
        self._warn_if_nothing_is_learned(entry, args.logging_steps)
        _warn_if_not_finite(entry)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        assert self.trainer is not None
        self._write_samples(self.trainer)
        if self._bar is not None and log.on_terminal():
            self._bar.advance(1)

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
        validation = validation_of(
            {"step": state.global_step, "epoch": state.epoch or 0.0, **metrics}, best
        )
        self._report_validation(validation)
        step = log.fraction(state.global_step, state.max_steps)
        log.info(
            "validation", step=step, **validation.metrics, took=log.seconds(validation.seconds)
        )
        self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        assert self.trainer is not None
        if (self._directory / SAMPLES).stat().st_size == 0:  # nothing was left to train
            first, last = self.trainer.first_samples, self.trainer.last_samples
            self._append(first)
            self._append([each for each in last if each not in first])
        self.close()

    def close(self) -> None:
        """Closes the bar; also called if the stage fails."""
        self._stack.close()

    def _write_samples(self, trainer: "ReinforceTrainer") -> None:
        """Those of the last rollout; after a resume, those of the first step of all before them."""
        samples = [each.to_json() for each in trainer.samples]
        trainer.samples = []
        if (self._directory / SAMPLES).stat().st_size == 0:
            self._append(trainer.first_samples)
        trainer.first_samples = trainer.first_samples or samples
        trainer.last_samples = samples or trainer.last_samples
        self._append(samples)

    def _append(self, samples: Sequence[Mapping[str, Any]]) -> None:
        with (self._directory / SAMPLES).open("a", encoding="utf-8") as lines:
            lines.writelines(as_json(each) + "\n" for each in samples)

    def _write(self, state: TrainerState) -> None:
        """The whole history: a resumed stage has the steps before from the trainer's log."""
        lines = (as_json(entry) + "\n" for entry in history_of(state.log_history))
        (self._directory / HISTORY).write_text("".join(lines), encoding="utf-8")

    def _measured(self, state: TrainerState, entry: Mapping[str, Any]) -> telemetry.Step:
        now = time.monotonic()
        tokens = state.num_input_tokens_seen - self._tokens
        speed = tokens / max(now - self._logged, 1e-9)
        self._logged, self._tokens = now, state.num_input_tokens_seen
        done = state.global_step - self._first_step
        left = (state.max_steps - state.global_step) * (now - self._started) / max(done, 1)
        return telemetry.Step(
            step=state.global_step,
            steps=state.max_steps,
            epoch=round(state.epoch or 0.0, 4),
            loss=float(entry["loss"]),
            learning_rate=float(entry["learning_rate"]),
            grad_norm=float(entry.get("grad_norm", 0.0)),
            tokens_per_second=round(speed, 1),
            data_wait_seconds=0.0,
            data_wait_share=0.0,
            memory_bytes=self._accelerator.peak_memory_bytes(),
            seconds=round(now - self._started, 3),
            left_seconds=round(left, 3),
        )

    def _warn_if_nothing_is_learned(self, entry: Mapping[str, Any], steps: int) -> None:
        """Warns once rewards have been equal for `EQUAL_STEPS`; `entry` is that of the last `steps`
        steps."""
        equal_groups = entry.get("equal_groups")
        if equal_groups is None:
            return
        if equal_groups < 1:
            self._equal_steps = 0
            return
        before, self._equal_steps = self._equal_steps, self._equal_steps + steps
        if before < EQUAL_STEPS <= self._equal_steps:
            log.warn(
                "nothing is learned: all answers to a row have the same reward",
                steps=self._equal_steps,
                reward=entry.get("reward"),
                fix=NOTHING_LEARNED,
            )


def _warn_if_not_finite(entry: Mapping[str, Any]) -> None:
    if not math.isfinite(entry["loss"]):
        log.warn(
            "the loss is not finite: the training has probably diverged",
            fix="lower reinforce.learning_rate, or raise reinforce.warmup_steps",
        )


def read_history(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / HISTORY).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
