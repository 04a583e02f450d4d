"""The reinforce stage, top to bottom: prompts, adapter, trainer, training, result."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from job import log, signals
from job.engines.data_timer import DataTimer
from job.engines.device import resolve_optim
from job.engines.parameter_groups import LearningRates
from job.engines.ways import EIGHT_BIT
from job.errors import OutOfMemoryError, Stopped
from job.reinforce.progress import NOTHING_LEARNED, ReinforceProgress
from job.reinforce.prompts import Prompts, RolloutOrder
from job.reinforce.result import ReinforceResult, summarize
from job.reinforce.scoring import Scorer
from job.reinforce.settings import as_training, grpo_config
from job.reinforce.special_tokens import special_tokens_kept
from job.rewards.named import NamedReward
from job.spec.output_folders import REINFORCED
from job.spec.types import JobSpec, ReinforceSpec
from job.train.adapting import AdaptedModel, adapt
from job.train.best_model import load_best
from job.train.callbacks.checkpoint import CheckpointCallback
from job.train.callbacks.stop import StopCallback
from job.train.callbacks.validation_schedule import ValidationSchedule
from job.train.checkpoint.contents import resume_problem
from job.train.checkpoint.resume import resume_point, step_of
from job.train.checkpoint.storage import CheckpointStore
from job.train.checkpoint.uploads import BackgroundUploads
from job.train.gc_freeze import frozen_gc
from job.train.outputs import store_trained
from job.train.schedule import Schedule
from job.train.selection import Selection
from job.train.session import continue_selection, remove_default_callbacks, remove_scratch
from job.train.train_context import TrainContext
from job.train.validating_trainer import ValidationPlan
from job.train.validation import Validator
from job.train.validation_rows import select_validation_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback

    from job.reinforce.trainer import ReinforceTrainer


@dataclass(frozen=True, kw_only=True)
class ReinforceSession:
    """A trainer with what it resumes from; has what `load_best` reads."""

    spec: JobSpec
    """That of `as_training`."""
    own: ReinforceSpec
    trainer: "ReinforceTrainer"
    selection: Selection | None
    validator: Validator | None
    checkpoints: CheckpointStore
    uploads: BackgroundUploads
    progress: ReinforceProgress
    resumed_from: Path | None

    @property
    def stored(self) -> str:
        """The newest step whose checkpoint is stored, in words."""
        step = self.uploads.stored_step or step_of(self.resumed_from)
        return f"the checkpoint of step {step} is stored" if step else "no checkpoint is stored yet"


def reinforce(
    context: TrainContext, model: "PreTrainedModel", rewards: tuple[NamedReward, ...]
) -> "tuple[PreTrainedModel | PeftModel, ReinforceResult]":
    """Trains the adapter `context.start` on `model` by the rewards of its own answers.

    Writes the adapter, the history and samples of the answers to `reinforced/` in the directory;
    returns the model in evaluation mode, and the result. `context.spec` is the job's.

    Raises DataError if no prompt fits, OutOfMemoryError if an answer or a pass does not, SpecError
    if the device lacks the optimizer, or no step is the best, and Stopped after SIGTERM, once the
    checkpoint is stored.
    """
    own = context.spec.reinforce
    assert own is not None
    on_gpu = context.accelerator.kind != "cpu"
    context = replace(context, spec=as_training(context.spec, on_gpu=on_gpu), folder=REINFORCED)
    spec = context.spec
    adapted = adapt(spec, context.engine, context.family, model, context.start)
    prompts = Prompts(
        family=context.family, rows=context.data.rows("train"), max_length=spec.train.max_length
    )
    order = RolloutOrder.of(own, prompts, spec.train.seed)
    _log_start(own, prompts, rewards, adapted)
    context.accelerator.reset_peak_memory()
    scorer = Scorer(prompts=prompts, rewards=rewards)
    session = _start_session(context, own, adapted, scorer, order)
    seconds = _run_session(session, context, adapted)
    kept = load_best(session, context.scratch, "reinforce")
    trained = store_trained(spec, context.family, session.trainer, context.directory / REINFORCED)
    assert trained is not None, "this stage runs in one process"
    remove_scratch(context)
    result = summarize(context, session, adapted, order, seconds=seconds, kept=kept)
    if not result.learned:
        log.warn(
            "nothing was learned: all answers to a row had the same reward, in every step",
            reward=result.last_reward,
            fix=NOTHING_LEARNED,
        )
    elif result.reward_fell:
        log.warn(
            "the reward fell to less than half of what it was at first",
            first_reward=result.first_reward,
            last_reward=result.last_reward,
            fix="lower reinforce.learning_rate, or keep the best step: "
            "reinforce.load_best_model_at_end: true with reinforce.eval_strategy: steps",
        )
    return trained, result


def _log_start(
    own: ReinforceSpec,
    prompts: Prompts,
    rewards: tuple[NamedReward, ...],
    adapted: AdaptedModel,
) -> None:
    log.info(
        "reinforcement",
        rows=len(prompts.rows),
        passed_over=len(prompts.passed_over),
        answers_a_row=own.num_generations,
        rows_a_step=own.rows_a_step,
        rewards=", ".join(f"{each.name} × {each.weight:g}" for each in rewards),
        trainable=f"{adapted.trainable_parameters:,} of {adapted.total_parameters:,}",
    )


def _start_session(
    context: TrainContext,
    own: ReinforceSpec,
    adapted: AdaptedModel,
    scorer: Scorer,
    order: RolloutOrder,
) -> ReinforceSession:
    """Builds the trainer, and fetches the checkpoint to resume from, if there is one."""
    from job.evaluation.sampling import Sampling
    from job.reinforce.trainer import ReinforceTrainer, rollouts_problem

    spec, uploads = context.spec, BackgroundUploads()
    validation = select_validation_rows(context)
    validator = None if validation is None else Validator(context, validation, adapted, None)
    plan = ValidationPlan.of(spec.train, validator)
    selection = None if plan is None else plan.selection
    checkpoints = replace(context.checkpoints, schedule=_schedule(own))
    progress = ReinforceProgress(
        context.accelerator,
        context.train_directory,
        context.report_step,
        context.report_validation,
        selection,
    )
    remove_scratch(context)  # of a killed run
    obstacle = context.ways.obstacle(EIGHT_BIT)
    optim = resolve_optim(spec.train, context.accelerator, obstacle, section="reinforce")
    trainer = ReinforceTrainer(
        adapted=adapted,
        family=context.family,
        prompts=scorer.prompts,
        scorer=scorer,
        sampling=Sampling(
            max_new_tokens=own.max_completion_length,
            temperature=own.temperature,
            top_p=own.top_p,
        ),
        beta=own.beta,
        plan=plan,
        batch_sampler=order,
        data_timer=DataTimer(),
        learning_rates=LearningRates.of(spec.train),
        args=grpo_config(spec, own, optim, context.engine, context.scratch),
        callbacks=_callbacks(context, checkpoints, uploads, progress, selection),
    )
    progress.trainer = trainer
    remove_default_callbacks(trainer)

    def check(directory: Path) -> str | None:
        return resume_problem(directory, trainer) or rollouts_problem(directory)

    resumed = resume_point(spec.train, checkpoints, context.scratch, check)
    if resumed is not None:
        trainer.restore_samples(resumed)
    if selection is not None and resumed is not None:
        continue_selection(selection, spec, checkpoints, resumed)
    return ReinforceSession(
        spec=spec,
        own=own,
        trainer=trainer,
        selection=selection,
        validator=validator,
        checkpoints=checkpoints,
        uploads=uploads,
        progress=progress,
        resumed_from=resumed,
    )


def _callbacks(
    context: TrainContext,
    checkpoints: CheckpointStore,
    uploads: BackgroundUploads,
    progress: ReinforceProgress,
    selection: Selection | None,
) -> "list[TrainerCallback]":
    """The trainer's callbacks, in the order of their calls."""
    context.trackers.set_environment()
    train = context.spec.train
    schedule = [] if selection is None else [ValidationSchedule(train)]
    store = CheckpointCallback(
        checkpoints, train.save_total_limit, uploads, context.check_lease, selection
    )
    return [*schedule, StopCallback(), store, progress]


def _schedule(own: ReinforceSpec) -> Schedule:
    return Schedule(
        lr_scheduler_type=own.lr_scheduler_type,
        warmup_steps=own.warmup_steps,
        learning_rate=own.learning_rate,
        steps=own.max_steps,
        section="reinforce",
    )


def _run_session(session: ReinforceSession, context: TrainContext, adapted: AdaptedModel) -> float:
    """Trains to the last step; returns the seconds it took."""
    trainer, resumed = session.trainer, session.resumed_from
    started = time.monotonic()
    try:
        kept = special_tokens_kept(adapted.base)
        with signals.deferred(), context.trackers, session.uploads, frozen_gc(), kept:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except (RuntimeError, MemoryError) as error:
        _raise_if_out_of_memory(error, session.own, context)
        raise
    finally:
        session.progress.close()
        context.family.set_router_aux_loss(adapted.base, 0)
    seconds = time.monotonic() - started
    if signals.received():
        raise Stopped(
            str(signals.received()),
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps} of "
            f"reinforce; {session.stored}",
            fix="run the same spec again; it resumes from there",
        )
    return seconds


def _raise_if_out_of_memory(
    error: BaseException, own: ReinforceSpec, context: TrainContext
) -> None:
    from job.engines.free_memory import is_out_of_memory

    if not is_out_of_memory(error):
        return
    size, passes = own.per_device_train_batch_size, own.gradient_accumulation_steps
    part = max((n for n in range(1, size // 2 + 1) if size % n == 0), default=1)
    raise OutOfMemoryError(
        "$.reinforce.per_device_train_batch_size",
        f"a training pass does not fit into the {log.size(context.accelerator.memory_bytes)} of "
        f"{context.accelerator.name}",
        value=size,
        fix=(
            f"--set reinforce.per_device_train_batch_size={part} "
            f"--set reinforce.gradient_accumulation_steps={passes * (size // part)}"
            if size > 1
            else "lower reinforce.max_completion_length or data.max_pixels"
        ),
    ) from error
