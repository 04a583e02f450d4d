"""The train stage: trains an adapter, or the model's weights, on the prepared rows.

`train` calls its parts in order; the training step is `job.engines.trainer.StepTrainer.train_step`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from job import log
from job.distributed import process_group
from job.engines.compiling import CompiledBlocks
from job.engines.device import resolve_optim
from job.engines.unread import UnreadWeights
from job.engines.ways import EIGHT_BIT, agreed
from job.spec.types import TrainSpec
from job.train.adapting import AdaptedModel, adapt, loss_of_supervised_tokens, require_images
from job.train.batch_size_finder import find_batch_size
from job.train.best_model import load_best
from job.train.capturing import capture_training, may_capture
from job.train.checkpoint.resume import optimizer_to_resume
from job.train.compiled_training import compile_model
from job.train.dataset import Collator
from job.train.heaviest_batches import planned_batches
from job.train.outputs import store_trained
from job.train.result import Search, TrainResult, summarize
from job.train.session import remove_scratch, run_session, start_session
from job.train.train_context import TrainContext
from job.train.trainer_setup import planned_sampler
from job.train.training_rows import TrainingRows, select_rows
from job.train.trial import Trial, pass_memory
from job.train.untrained import store_untrained
from job.train.validation import Validator
from job.train.validation_rows import select_validation_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def train(
    context: TrainContext, model: "PreTrainedModel", unread: UnreadWeights | None = None
) -> "tuple[PreTrainedModel | PeftModel | None, TrainResult | None]":
    """Trains `model`; writes the adapter (or weights), label proof and history to the directory.

    `unread` are its weights, if they are to be read once it is sharded.
    The weights are the last step's, or the best step's if the spec wants them. All processes of a
    group have to call it. Rank 0 alone writes, and returns the trained model (None if it is
    sharded) and the result; other ranks return None twice. The label proof is published before
    step 1.

    Raises DataError if a batch has no supervised token, OutOfMemoryError if a step does not fit,
    StorageError if the best step's checkpoint cannot be read, SpecError if no step is the best, and
    Stopped after SIGTERM, once the checkpoint is stored.
    """
    # Before anything depends on them: ranks that differ would call different collectives.
    context = replace(context, ways=agreed(process_group.all_gather(context.ways)))
    optim = _optim(context)
    rows, validation = select_rows(context), select_validation_rows(context)
    adapted = adapt(context.spec, context.engine, context.family, model, context.start)
    require_images(adapted, rows.measured)
    if context.spec.train.max_steps == 0:
        return store_untrained(context, rows, adapted)
    _log_start(context, rows, adapted, optim)
    _log_options(context.spec.train)

    # Before the trial, which runs the compiled blocks.
    blocks, compiling = compile_model(context, rows, adapted)
    with loss_of_supervised_tokens(context.spec, context.engine, adapted.base):
        trial = _trial(context, rows, adapted, optim, blocks)
        spec, fit = find_batch_size(context.spec, context.accelerator, trial)
        context.accelerator.reset_peak_memory()  # trial and baseline evaluation do not count
        captured = capture_training(context, spec, rows, adapted)

    validator = None if validation is None else Validator(context, validation, adapted, blocks)
    session = start_session(context, spec, rows, adapted, optim, validator, captured, unread)
    seconds = run_session(session, context, adapted)
    if blocks is not None:
        blocks.release()

    kept = load_best(session, context.scratch)
    rank_0 = process_group.rank() == 0
    trained = store_trained(
        spec, context.family, session.trainer, context.directory if rank_0 else None
    )
    process_group.barrier()
    remove_scratch(context)
    if not rank_0:
        return None, None
    search = Search(fit=fit, compiling=compiling)
    return trained, summarize(context, rows, adapted, session, search, seconds, kept)


def _optim(context: TrainContext) -> str:
    """The optimizer, the same in all processes: each updates a copy of the same weights, or a shard
    of them."""
    obstacle = context.ways.obstacle(EIGHT_BIT)
    if context.spec.shards_weights:
        obstacle = "it does not update sharded weights"
    found = resolve_optim(context.spec.train, context.accelerator, obstacle)
    if len(set(process_group.all_gather(found))) > 1:
        return "adamw_torch_fused"
    return optimizer_to_resume(context.spec.train, context.checkpoints, found)


def _log_start(
    context: TrainContext, rows: TrainingRows, adapted: AdaptedModel, optim: str
) -> None:
    statistics = rows.statistics
    trainable, total = adapted.trainable_parameters, adapted.total_parameters
    log.info(
        "training",
        rows=len(rows.dataset),
        tokens_a_row=statistics["tokens_a_row"]["mean"],
        longest=statistics["tokens_a_row"]["max"],
        over_max_length=f"{statistics['over_max_length']['share']:.2%}",
        dropped=rows.filtered.dropped,
        trainable=f"{trainable:,} of {total:,} ({trainable / total:.2%})",
        optim=optim,
        device=context.accelerator.name,
    )


def _log_options(train: TrainSpec) -> None:
    """Logs options of the step that are off by default."""
    own = {"vision_tower": train.vision_tower_lr, "lora_b_times": train.loraplus_lr_ratio}
    given = {name: value for name, value in own.items() if value is not None}
    if given:
        log.info("learning rates", learning_rate=train.learning_rate, **given)
    if train.neftune_noise_alpha is not None:
        log.info("noise is added to the embeddings in training", alpha=train.neftune_noise_alpha)


def _trial(
    context: TrainContext,
    rows: TrainingRows,
    adapted: AdaptedModel,
    optim: str,
    blocks: CompiledBlocks | None,
) -> Trial:
    def planned(train: TrainSpec) -> Iterator[list[int]]:
        spec = replace(context.spec, train=train)
        return planned_batches(
            planned_sampler(spec, rows, padding_free=adapted.padding_free), train
        )

    return Trial(
        engine=context.engine,
        model=adapted.model,
        dataset=rows.dataset,
        collator=Collator(context.family, padding_free=adapted.padding_free),
        planned_batches=planned,
        estimate=pass_memory(context, rows),
        optim=optim,
        padding_free=adapted.padding_free,
        captured=may_capture(context, adapted),
        blocks=blocks,
    )
