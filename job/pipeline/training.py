"""Sets up and runs the training; called in every process."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from job.pipeline.context import RunContext
from job.pipeline.fingerprints import Stage
from job.spec.output_folders import LOGS
from job.spec.types import JobSpec
from job.train.identity import Identity

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from job.engines.stored_adapter import StoredAdapter
    from job.evaluation.validation_answers import ValidationAnswers
    from job.train.checkpoint.storage import CheckpointStore
    from job.train.result import TrainResult
    from job.train.train_context import TrainContext


def train(
    run: RunContext, directory: Path, identity: Identity | None = None
) -> "tuple[PreTrainedModel | PeftModel | None, TrainResult | None]":
    """Trains; returns the model (None if it is sharded) and the result on rank 0, else None twice.

    Only rank 0 passes an `identity`: it chooses the checkpoint to resume from, and stores new ones.
    """
    from job.distributed import process_group
    from job.train.train import train as train_model

    logs = run.spec.train.logging_dir or run.output.at(LOGS)
    with process_group.initialized(run.coordinator, run.accelerator.kind):
        # Before the model takes memory: ways to compute are tried for it.
        context = training_context(
            run,
            "train",
            directory,
            settings=run.spec,
            start=run.start_adapter,
            checkpoints=run.checkpoints(identity),
            tracker_files=run.output.workdir / "logs",
            logs=logs,
        )
        return train_model(context, *run.models.to_train())


def training_context(
    run: RunContext,
    stage: Stage,
    directory: Path,
    *,
    settings: JobSpec,
    start: "StoredAdapter | None",
    checkpoints: "CheckpointStore",
    tracker_files: Path,
    logs: str,
) -> "TrainContext":
    """What a stage that trains is given by the run.

    `settings` has the stage's settings in its train section. Trackers write to the folder
    `tracker_files`, whose files are stored at the URI `logs`.
    """
    from job.train.trackers import TrackerFiles
    from job.train.train_context import TrainContext

    output = run.output
    return TrainContext(
        spec=run.spec,
        engine=run.engine,
        accelerator=run.accelerator,
        family=run.family,
        start=start,
        data=run.data,
        directory=directory,
        scratch=output.workdir / "trainer",
        checkpoints=checkpoints,
        publish=functools.partial(output.stages.publish_file, stage),
        check_lease=output.check_lease,
        report_step=run.status.set_step,
        report_validation=run.status.set_validation,
        answer_metrics=_answer_metrics(run, settings),
        ways=run.training_ways,
        trackers=TrackerFiles(
            run.spec.train.report_to, tracker_files, logs, output.uploader_for(logs)
        ),
    )


def _answer_metrics(run: RunContext, spec: JobSpec) -> "ValidationAnswers | None":
    """What measures generated answers in validations; None if `spec` measures the loss only."""
    from job.evaluation.validation_answers import ValidationAnswers

    if not spec.train.validates or not spec.train.generates_answers:
        return None
    return ValidationAnswers.of(
        run.family,
        spec.eval,
        run.data.rows("validation"),
        batch_size=spec.train.per_device_eval_batch_size,
    )
