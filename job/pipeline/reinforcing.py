"""Sets up and runs the reinforce stage."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from job import storage
from job.engines.device import resolve_optim
from job.errors import SpecError
from job.pipeline.context import REINFORCE, RunContext
from job.pipeline.training import training_context
from job.spec.output_folders import LOGS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from job.reinforce.result import ReinforceResult


def require_one_process(run: RunContext) -> None:
    """Raises SpecError if several processes would train: this version runs the stage in one."""
    if run.processes > 1 and run.spec.reinforce is not None:
        raise SpecError(
            "$.reinforce",
            f"runs in one process, but this job has {run.processes}",
            fix="start one process, without torchrun; several can train before, by the same spec "
            "without this section and with the same output, and that training is kept",
        )


def require_optimizer(run: RunContext) -> None:
    """Raises SpecError if the device has none of the stage's kind; its trial may end so later."""
    if run.spec.reinforce is not None:
        train = replace(run.spec.train, optim=run.spec.reinforce.optim)
        resolve_optim(train, run.accelerator, section="reinforce")


def reinforce(
    run: RunContext, directory: Path
) -> "tuple[PreTrainedModel | PeftModel, ReinforceResult]":
    """Runs the stage into `directory`; returns the model and the result."""
    from job.reinforce.reinforce import reinforce as run_stage
    from job.reinforce.settings import as_training

    spec, output = run.spec, run.output
    logs = storage.join(spec.train.logging_dir or output.at(LOGS), REINFORCE)
    run.models.release()  # the trained model: the adapter is read again, as after a resume
    context = training_context(
        run,
        "reinforce",
        directory,
        settings=as_training(spec, on_gpu=False),
        start=run.sft_adapter(),
        checkpoints=run.reinforcement_checkpoints(),
        tracker_files=output.workdir / f"logs-{REINFORCE}",
        logs=logs,
    )
    return run_stage(context, run.models.base(), run.inputs.rewards)
