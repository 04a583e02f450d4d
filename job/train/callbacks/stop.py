"""Stops the training after a step, in all processes after the same one."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import signals
from job.distributed import process_group


class StopCallback(TrainerCallback):
    """Asks for a checkpoint and the end where a process has been asked to stop."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if control.should_save:
            # A checkpoint is compared by the losses since the one before.
            control.should_log = True
        # At a step where none is due a log would be one that an undisturbed training has not.
        if process_group.any_rank(signals.received() is not None):
            if signals.received() is None:
                signals.relay()
            control.should_save = True
            control.should_training_stop = True
