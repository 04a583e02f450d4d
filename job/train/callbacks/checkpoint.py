"""Uploads the Trainer's checkpoints to the output, in the background."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import log, signals
from job.train.callbacks.shards import ShardsCallback
from job.train.checkpoint.storage import CheckpointStore
from job.train.checkpoint.uploads import BackgroundUploads
from job.train.selection import Selection


class CheckpointCallback(TrainerCallback):
    """Uploads each checkpoint that the Trainer has written to the local disk.

    `check_lease` raises if another job has taken over the output. `shards` stores the files of
    other machines.
    """

    def __init__(
        self,
        store: CheckpointStore,
        keep: int,
        uploads: BackgroundUploads,
        check_lease: Callable[[], None],
        selection: Selection | None = None,
        shards: ShardsCallback | None = None,
    ) -> None:
        self._store, self._keep, self._uploads = store, keep, uploads
        self._check_lease, self._selection = check_lease, selection
        self._shards = shards
        self._save_started = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._uploads.check()
        self._save_started = time.monotonic()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Before a checkpoint that is stored within a step, which a stop has cut short."""
        self._save_started = time.monotonic()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._save_started = time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        assert args.output_dir is not None
        step, started = state.global_step, self._save_started
        written = Path(args.output_dir, f"checkpoint-{step}")
        # The Trainer must not rotate it away before it is uploaded.
        directory = Path(args.output_dir, "uploads", f"step-{step}")
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(exist_ok=True)
        written.rename(directory)
        loss = _loss_since_last(state) if _is_due(state) else None
        errors = self._selection.errors(state.log_history) if self._selection else {}
        metrics = _metrics(state)
        others = self._shards.stored if self._shards else ()
        local_seconds = time.monotonic() - started

        def store() -> None:
            upload_started = time.monotonic()
            self._check_lease()
            self._store.save(directory, step, loss, metrics, others)
            stored_seconds = time.monotonic() - upload_started
            shutil.rmtree(directory, ignore_errors=True)
            self._check_lease()
            self._store.prune(self._keep, step, errors)
            self._log_stored(step, local_seconds, stored_seconds)

        # The upload that is waiting may be that of the best model, which nothing replaces.
        best_waits = self._uploads.submitted_step == state.best_global_step
        urgent = signals.received() is not None and not best_waits
        self._uploads.submit(step, store, urgent=urgent)

    def _log_stored(self, step: int, local_seconds: float, stored_seconds: float) -> None:
        log.info(
            "checkpoint stored",
            step=step,
            written=log.seconds(local_seconds),
            uploaded=log.seconds(stored_seconds),
        )
        grace = signals.grace_seconds()
        if local_seconds + stored_seconds > grace:
            log.warn(
                "storing a checkpoint takes longer than the grace period after SIGTERM",
                takes=log.seconds(local_seconds + stored_seconds),
                grace=log.seconds(grace),
                fix="raise terminationGracePeriodSeconds of the pod and set "
                f"{signals.GRACE_VARIABLE} to the same seconds",
            )


def _is_due(state: TrainerState) -> bool:
    """Whether an uninterrupted training would store a checkpoint at this step too.

    Only those have a loss: one stored because of a stop must not become the best checkpoint.
    """
    return state.global_step % state.save_steps == 0 or state.global_step >= state.max_steps


def _loss_since_last(state: TrainerState) -> float | None:
    """The mean logged loss since the previous regular checkpoint, or None."""
    due = (state.global_step - 1) // state.save_steps * state.save_steps
    losses = [e["loss"] for e in state.log_history if e["step"] > due and "loss" in e]
    return sum(losses) / len(losses) if losses else None


def _metrics(state: TrainerState) -> dict[str, float]:
    """The metrics of this step's validation, if there was one."""
    entries = [entry for entry in state.log_history if entry["step"] == state.global_step]
    return {
        k: v
        for entry in entries
        for k, v in entry.items()
        if k.startswith("eval_") and math.isfinite(v)
    }
