"""Builds `TrainingArguments`, the batch sampler and the learning rate schedule from the spec."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from job.distributed import process_group
from job.engines.base import Engine
from job.prep.streaming import StreamedRows
from job.spec.types import JobSpec, TrainSpec
from job.train import micro_batches
from job.train.prefetch import PrefetchingBatchSampler
from job.train.sampler import BlockShuffleSampler, DistributedBatchSampler, shuffled
from job.train.schedule import Schedule
from job.train.training_rows import TrainingRows

if TYPE_CHECKING:
    from transformers import TrainingArguments

Arguments = TypeVar("Arguments", bound="TrainingArguments")


def training_arguments(
    job: JobSpec, optim: str, engine: Engine, scratch: Path, fsdp_config: dict[str, Any] | None
) -> "TrainingArguments":
    from transformers import TrainingArguments

    return arguments_of(
        TrainingArguments,
        job,
        optim,
        engine,
        scratch,
        # FSDP2's mixed precision would cast the router gates too, which stay fp32.
        bf16=engine.autocast and fsdp_config is None,
        fsdp=fsdp_config is not None,
        fsdp_config=fsdp_config,
    )


def arguments_of(
    kind: "Callable[..., Arguments]",
    job: JobSpec,
    optim: str,
    engine: Engine,
    scratch: Path,
    **more: object,
) -> "Arguments":
    """Arguments of a trainer: `kind` is their class, and `more` are those of its own."""
    spec = job.train
    settings: dict[str, Any] = {"bf16": engine.autocast, **more}
    arguments = kind(
        output_dir=str(scratch),
        per_device_train_batch_size=spec.per_device_train_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler_type,
        warmup_steps=spec.warmup_steps,
        num_train_epochs=spec.num_train_epochs,
        max_steps=spec.max_steps,
        optim=optim,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.adam_beta1,
        adam_beta2=spec.adam_beta2,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        data_seed=spec.seed,
        logging_steps=spec.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=spec.save_steps,
        gradient_checkpointing=spec.gradient_checkpointing,
        # A process whose rows have no image uses no weights of the vision tower.
        ddp_find_unused_parameters=True,
        use_cpu=engine.device.type == "cpu",
        dataloader_num_workers=spec.dataloader_num_workers,
        dataloader_persistent_workers=spec.dataloader_num_workers > 0,
        dataloader_pin_memory=engine.device.type != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        include_num_input_tokens_seen="non_padding",
        report_to=(list(spec.report_to) if process_group.rank() == 0 else []) or "none",
        run_name=job.name,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",  # by default, warnings: other processes would speak
        **settings,
    )
    # One GPU per process, even if it sees several: the Trainer would use DataParallel, which splits
    # each batch, but a packed batch is one sequence.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def batch_sampler(
    spec: JobSpec, rows: TrainingRows, *, padding_free: bool
) -> DistributedBatchSampler | PrefetchingBatchSampler:
    """This process's micro-batches in an epoch; prefetches the shards of streamed rows."""
    batches = planned_sampler(spec, rows, padding_free=padding_free)
    if not isinstance(rows.rows, StreamedRows) or not process_group.is_local_rank_zero():
        return batches
    buffer = spec.data.shuffle_buffer_size // process_group.size()
    return PrefetchingBatchSampler(batches, rows.rows, rows.filtered.indices, buffer)


def planned_sampler(
    spec: JobSpec, rows: TrainingRows, *, padding_free: bool
) -> DistributedBatchSampler:
    """This process's micro-batches in an epoch; fetches nothing."""
    filtered, buffer = rows.filtered, spec.data.shuffle_buffer_size
    streamed = rows.rows if isinstance(rows.rows, StreamedRows) else None
    size, count = spec.train.per_device_train_batch_size, len(filtered.indices)
    split = micro_batches.in_order(size)
    if spec.train.group_by_length:
        split = (
            micro_batches.balanced(size, filtered.lengths, filtered.patches)
            if padding_free
            else micro_batches.sorted_by_length(size, filtered.lengths)
        )
    return DistributedBatchSampler(
        BlockShuffleSampler(count, filtered.starts(streamed.blocks()), buffer, seed=spec.train.seed)
        if streamed
        else shuffled(count, spec.train.seed),
        size,
        micro_batches=spec.train.gradient_accumulation_steps,
        rank=process_group.rank(),
        processes=process_group.size(),
        split=split,
    )


def schedule_of(
    train: TrainSpec, batches: DistributedBatchSampler | PrefetchingBatchSampler
) -> Schedule:
    """The learning rate schedule of a training whose epochs have these batches."""
    steps_per_epoch = -(-len(batches) // train.gradient_accumulation_steps)
    steps = train.max_steps
    return Schedule(
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        learning_rate=train.learning_rate,
        steps=steps if steps > 0 else math.ceil(train.num_train_epochs * steps_per_epoch),
    )
