"""Stores checkpoints at the output, and stops the training when the job is asked to."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import log, signals
from job.train.checkpoints import CheckpointStore


class StoreCallback(TrainerCallback):
    """After Trainer has saved a checkpoint to the local disk, stores it at the output."""

    def __init__(self, store: CheckpointStore, keep: int) -> None:
        self._store, self._keep = store, keep
        self.stored_step: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if signals.received():
            control.should_save = True
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert args.output_dir is not None
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._store.save(directory, state.global_step)
        self._store.prune(self._keep)
        self.stored_step = state.global_step
        log.debug("checkpoint stored", step=state.global_step)
