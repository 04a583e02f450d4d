"""A session of a training: from the start, or a checkpoint, to the last step or a stop."""

import functools
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from job import log, signals
from job.distributed import process_group
from job.engines import sharding
from job.engines.data_timer import DataTimer
from job.engines.neftune import noisy_embeddings
from job.engines.parameter_groups import NAME, LearningRates
from job.engines.unread import UnreadWeights
from job.errors import Stopped
from job.spec.types import JobSpec
from job.train.adapting import AdaptedModel, loss_of_supervised_tokens
from job.train.callbacks.checkpoint import CheckpointCallback
from job.train.callbacks.progress import ProgressCallback
from job.train.callbacks.shards import ShardsCallback
from job.train.callbacks.stop import StopCallback
from job.train.callbacks.validation_schedule import ValidationSchedule
from job.train.capturing import CapturedTraining
from job.train.checkpoint.contents import resume_problem
from job.train.checkpoint.resume import resume_point, step_of
from job.train.checkpoint.storage import CheckpointStore
from job.train.checkpoint.uploads import BackgroundUploads
from job.train.dataset import Collator
from job.train.gc_freeze import frozen_gc
from job.train.out_of_memory import raise_if_out_of_memory
from job.train.selection import Selection
from job.train.throughput import Throughput, throughput
from job.train.train_context import TrainContext
from job.train.trainer_setup import batch_sampler, schedule_of, training_arguments
from job.train.training_rows import TrainingRows
from job.train.validating_trainer import ValidatingTrainer, ValidationPlan, log_of
from job.train.validation import Validator

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True, kw_only=True)
class Session:
    """A trainer with its checkpoints, uploads, timer and progress."""

    spec: JobSpec
    """The spec, with the batch size that fits."""
    optim: str
    trainer: ValidatingTrainer
    validator: Validator | None
    """None if the spec does not validate, as is `selection`."""
    selection: Selection | None
    captured: CapturedTraining | None
    """The captured passes, freed once the training has ended; None if they run eagerly."""
    checkpoints: CheckpointStore
    uploads: BackgroundUploads
    data_timer: DataTimer
    progress: ProgressCallback
    throughput: Throughput | None
    """None if it is not shown."""
    resumed_from: Path | None
    """The local copy of the checkpoint; None if training starts from the beginning."""

    @property
    def stored_step(self) -> int:
        """The newest step whose checkpoint is stored, by this session or an earlier one."""
        return self.uploads.stored_step or step_of(self.resumed_from)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate by group of weights; empty if all have the same."""
        groups = self.trainer.create_optimizer().param_groups
        return {group[NAME]: group["initial_lr"] for group in groups if NAME in group}


def start_session(
    context: TrainContext,
    spec: JobSpec,
    rows: TrainingRows,
    adapted: AdaptedModel,
    optim: str,
    validator: Validator | None,
    captured: CapturedTraining | None,
    unread: UnreadWeights | None = None,
) -> Session:
    """Builds the trainer, and fetches the checkpoint to resume from, if there is one."""
    uploads, data_timer = BackgroundUploads(), DataTimer()
    plan = ValidationPlan.of(spec.train, validator)
    selection = None if plan is None else plan.selection
    computed = throughput(context, rows, adapted)
    progress = ProgressCallback(
        context.accelerator,
        context.train_directory / "history.jsonl",
        context.report_step,
        data_timer,
        report_validation=context.report_validation,
        selection=selection,
        throughput=computed,
    )
    batches = batch_sampler(spec, rows, padding_free=adapted.padding_free)
    checkpoints = replace(context.checkpoints, schedule=schedule_of(spec.train, batches))
    fsdp = sharding.config(adapted.base) if spec.shards_weights else None
    remove_scratch(context)  # of a killed run
    trainer = ValidatingTrainer(
        plan=plan,
        batch_sampler=batches,
        data_timer=data_timer,
        learning_rates=LearningRates.of(spec.train),
        captured=captured.steps if captured else None,
        # An adapter computes in its base's bf16.
        sharded_autocast=context.engine.autocast and spec.shards_trained_weights,
        unread=unread,
        model=adapted.model,
        args=training_arguments(spec, optim, context.engine, context.scratch, fsdp),
        train_dataset=rows.dataset,
        data_collator=Collator(
            context.family,
            padding_free=adapted.padding_free,
            buckets=captured.buckets if captured else None,
        ),
        callbacks=_callbacks(context, spec, checkpoints, uploads, progress, selection),
    )
    remove_default_callbacks(trainer)
    resumed = resume_point(
        spec.train, checkpoints, context.scratch, functools.partial(resume_problem, trainer=trainer)
    )
    if selection is not None and resumed is not None:
        continue_selection(selection, spec, checkpoints, resumed)
    return Session(
        spec=spec,
        optim=optim,
        trainer=trainer,
        validator=validator,
        selection=selection,
        captured=captured,
        checkpoints=checkpoints,
        uploads=uploads,
        data_timer=data_timer,
        progress=progress,
        throughput=computed,
        resumed_from=resumed,
    )


def _callbacks(
    context: TrainContext,
    spec: JobSpec,
    checkpoints: CheckpointStore,
    uploads: BackgroundUploads,
    progress: ProgressCallback,
    selection: Selection | None,
) -> "list[TrainerCallback]":
    """This process's callbacks, in the order of their calls."""
    callbacks: list[TrainerCallback] = [StopCallback()]
    if selection is not None:
        callbacks.insert(0, ValidationSchedule(spec.train))
    shards = None
    if spec.shards_trained_weights:
        shards = ShardsCallback(checkpoints, context.check_lease)
        callbacks.append(shards)
    if process_group.rank() == 0:
        context.trackers.set_environment()
        keep, check = spec.train.save_total_limit, context.check_lease
        store = CheckpointCallback(checkpoints, keep, uploads, check, selection, shards)
        callbacks += [store, progress]
    return callbacks


def continue_selection(
    selection: Selection, spec: JobSpec, checkpoints: CheckpointStore, resumed: Path
) -> None:
    """Decides which validations before the resume count, the same in all processes."""
    step, history = step_of(resumed), log_of(resumed)
    if spec.train.resume_from_checkpoint != "auto":
        selection.since = step
        return
    if not spec.train.load_best_model_at_end:
        return
    if process_group.rank() == 0:
        first = selection.best(history)
        while (best := selection.best(history)) and best.step != step:
            if checkpoints.holds(best.step):
                break
            selection.unavailable |= {best.step}
        if first is not None and first != best:
            log.warn(
                "the checkpoint of the best validation is not stored; the best of the others "
                "takes its place",
                step=first.step,
                instead=None if best is None else best.step,
            )
    selection.unavailable = process_group.broadcast(selection.unavailable)


def run_session(session: Session, context: TrainContext, adapted: AdaptedModel) -> float:
    """Trains to the last step; returns the seconds it took.

    Raises OutOfMemoryError if a step does not fit, and Stopped after SIGTERM, once the checkpoint
    is stored.
    """
    spec, trainer, resumed = session.spec, session.trainer, session.resumed_from
    rank_0 = process_group.rank() == 0
    trackers = context.trackers if rank_0 else nullcontext()
    loss = loss_of_supervised_tokens(spec, context.engine, adapted.base)
    noise = noisy_embeddings(adapted.model, spec.train.neftune_noise_alpha)
    started = time.monotonic()
    try:
        with signals.deferred(), trackers, session.uploads, frozen_gc(), loss, noise:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except (RuntimeError, MemoryError) as error:
        raise_if_out_of_memory(error, spec.train, context.accelerator)
        raise
    finally:
        session.progress.close()
        if session.captured is not None:
            session.captured.steps.release()
        context.family.set_router_aux_loss(adapted.base, 0)
    seconds = time.monotonic() - started
    if signals.received():
        raise Stopped(
            str(signals.received()),
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
            f"the checkpoint of step {session.stored_step} is stored",
            fix="run the same spec again; it resumes from there",
        )
    if rank_0 and resumed and trainer.state.global_step == step_of(resumed):
        log.info("nothing was left to train", step=trainer.state.global_step)
        context.check_lease()
        errors = session.selection.errors(trainer.state.log_history) if session.selection else None
        session.checkpoints.prune(spec.train.save_total_limit, trainer.state.global_step, errors)
    return seconds


def remove_scratch(context: TrainContext) -> None:
    """Removes local checkpoints, once per machine."""
    if process_group.is_local_rank_zero():
        shutil.rmtree(context.scratch, ignore_errors=True)


def remove_default_callbacks(trainer: ValidatingTrainer) -> None:
    from transformers.integrations import KubeflowCallback
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    # In a TrainJob, its requests block steps, and it reports the end of training as the end of the
    # job. `job.telemetry` reports to Kubeflow instead.
    trainer.remove_callback(KubeflowCallback)
