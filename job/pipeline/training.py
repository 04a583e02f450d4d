"""The training itself, in which every process takes part."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from job.pipeline.context import RunContext
from job.spec.rules.locations import LOGS
from job.train.identity import Identity

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from job.train.train import TrainResult


def train(
    run: RunContext, directory: Path, identity: Identity | None = None
) -> "tuple[PreTrainedModel | PeftModel | None, TrainResult | None]":
    """Trains; gives rank 0 the result, and the model unless it is sharded.

    Other ranks pass no `identity`: rank 0 chooses the checkpoint to resume from, and stores new
    ones.
    """
    from job.distributed import process_group
    from job.train.trackers import TrackerFiles
    from job.train.train import train as train_model

    logs = run.spec.train.logging_dir or run.output.at(LOGS)
    with process_group.initialized(run.coordinator, run.accelerator.kind):
        return train_model(
            run.spec,
            run.engine,
            run.accelerator,
            run.family,
            run.models.base(),
            run.data,
            directory,
            run.output.workdir / "trainer",
            run.checkpoints(identity),
            publish=functools.partial(run.output.stages.publish_file, "train"),
            require=run.output.check_lease,
            tell=run.status.set_step,
            trackers=TrackerFiles(
                run.spec.train.report_to,
                run.output.workdir / "logs",
                logs,
                run.output.uploader_for(logs),
            ),
        )
