"""Sets up and runs the training; called in every process."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from job.pipeline.context import RunContext
from job.spec.rules.locations import LOGS
from job.spec.types import JobSpec
from job.train.identity import Identity

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from job.evaluation.validation_answers import ValidationAnswers
    from job.train.result import TrainResult


def train(
    run: RunContext, directory: Path, identity: Identity | None = None
) -> "tuple[PreTrainedModel | PeftModel | None, TrainResult | None]":
    """Trains; returns the model (None if it is sharded) and the result on rank 0, else None twice.

    Only rank 0 passes an `identity`: it chooses the checkpoint to resume from, and stores new ones.
    """
    from job.distributed import process_group
    from job.train.trackers import TrackerFiles
    from job.train.train import train as train_model
    from job.train.train_context import TrainContext

    output, logs = run.output, run.spec.train.logging_dir or run.output.at(LOGS)
    with process_group.initialized(run.coordinator, run.accelerator.kind):
        tried = run.training_ways  # before the model takes memory
        model = run.models.base()
        context = TrainContext(
            spec=run.spec,
            engine=run.engine,
            accelerator=run.accelerator,
            family=run.family,
            start=run.start_adapter,
            data=run.data,
            directory=directory,
            scratch=output.workdir / "trainer",
            checkpoints=run.checkpoints(identity),
            publish=functools.partial(output.stages.publish_file, "train"),
            check_lease=output.check_lease,
            report_step=run.status.set_step,
            report_validation=run.status.set_validation,
            answer_metrics=answer_metrics(run, run.spec),
            ways=tried,
            trackers=TrackerFiles(
                run.spec.train.report_to,
                output.workdir / "logs",
                logs,
                output.uploader_for(logs),
            ),
        )
        return train_model(context, model)


def answer_metrics(run: RunContext, spec: JobSpec) -> "ValidationAnswers | None":
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
