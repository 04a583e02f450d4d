"""Stops the training after the same step in all processes."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job import signals
from job.distributed import process_group


class StopCallback(TrainerCallback):
    """Requests a checkpoint and the end of training once any process has received a signal."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if control.should_save:
            # Checkpoints are compared by the mean loss logged since the previous one.
            control.should_log = True
        # No log here: an uninterrupted training would have none at this step.
        if process_group.any_rank(signals.received() is not None):
            if signals.received() is None:
                signals.relay()
            control.should_evaluate = False  # the resumed training does it
            control.should_save = True
            control.should_training_stop = True
