"""The spec as Transformers' `Trainer` takes it: arguments, batches, and the trainer itself."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.distributed import process_group
from job.engines.base import Engine
from job.engines.data_timer import Waiting
from job.prep.rows import Row
from job.prep.streaming import StreamedRows
from job.spec.types import JobSpec, TrainSpec
from job.train import micro_batches
from job.train.dataset import Collator, EncodedDataset, Fitted
from job.train.prefetch import Ahead
from job.train.sampler import SharedBatches, Windows, shuffled
from job.train.schedule import Schedule

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments


def training_arguments(
    job: JobSpec,
    optim: str,
    engine: Engine,
    scratch: Path,
    first: bool,
    fsdp_config: dict[str, Any] | None,
) -> "TrainingArguments":
    from transformers import TrainingArguments

    spec = job.train
    arguments = TrainingArguments(
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
        # A process whose rows have no picture uses no weights of the vision tower.
        ddp_find_unused_parameters=True,
        # The policy of FSDP2 would round the gates, which stay fp32, too.
        bf16=engine.autocast and fsdp_config is None,
        fsdp=fsdp_config is not None,
        fsdp_config=fsdp_config,
        use_cpu=engine.device.type == "cpu",
        dataloader_num_workers=spec.dataloader_num_workers,
        dataloader_persistent_workers=spec.dataloader_num_workers > 0,
        dataloader_pin_memory=engine.device.type != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        include_num_input_tokens_seen="non_padding",
        report_to=(list(spec.report_to) if first else []) or "none",
        run_name=job.name,
        disable_tqdm=True,
        log_level="error",
    )
    # A process trains on one GPU, however many it sees: with more the Trainer would divide each
    # batch among copies of the model, and a packed batch is one sequence.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def batches_of(
    spec: JobSpec, rows: Sequence[Row], fitted: Fitted, *, padding_free: bool
) -> SharedBatches | Ahead:
    """This process's batches of an epoch; of streamed rows what is to come is fetched meanwhile."""
    batches = order_of(spec, rows, fitted, padding_free=padding_free)
    if not isinstance(rows, StreamedRows) or not process_group.is_local_rank_zero():
        return batches
    buffer = spec.data.shuffle_buffer_size // process_group.size()
    return Ahead(batches, rows, fitted.indices, buffer)


def order_of(
    spec: JobSpec, rows: Sequence[Row], fitted: Fitted, *, padding_free: bool
) -> SharedBatches:
    """This process's batches of an epoch, in an order that suits how the rows are kept."""
    count, buffer = len(fitted.indices), spec.data.shuffle_buffer_size
    streamed = rows if isinstance(rows, StreamedRows) else None
    width = spec.train.per_device_train_batch_size
    cut = micro_batches.in_order(width)
    if spec.train.group_by_length:
        cut = (
            micro_batches.balanced(width, fitted.lengths, fitted.patches)
            if padding_free
            else micro_batches.alike(width, fitted.lengths)
        )
    return SharedBatches(
        Windows(count, fitted.starts(streamed.blocks()), buffer, seed=spec.train.seed)
        if streamed
        else shuffled(count, spec.train.seed),
        width,
        passes=spec.train.gradient_accumulation_steps,
        process=process_group.rank(),
        processes=process_group.size(),
        cut=cut,
    )


def schedule_of(train: TrainSpec, batches: SharedBatches | Ahead) -> Schedule:
    """The learning rates of all steps of a training with these batches in an epoch."""
    an_epoch = -(-len(batches) // train.gradient_accumulation_steps)
    steps = train.max_steps
    return Schedule(
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        learning_rate=train.learning_rate,
        steps=steps if steps > 0 else math.ceil(train.num_train_epochs * an_epoch),
    )


def make_trainer(
    engine: Engine,
    model: Any,
    dataset: EncodedDataset,
    arguments: "TrainingArguments",
    collator: Collator,
    batches: SharedBatches | Ahead,
    waiting: Waiting,
    callbacks: "list[TrainerCallback]",
) -> "Trainer":
    from transformers.integrations import KubeflowCallback
    from transformers.trainer_callback import PrinterCallback

    from job.train.checkpoint.safetensors_trainer import resumable

    trainer = resumable(engine.trainer_class())(
        batches=batches,
        waiting=waiting,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    # It joins by itself in a TrainJob, waits for the Trainer in the middle of steps, and takes the
    # end of training for that of the job. `telemetry` tells the Trainer.
    trainer.remove_callback(KubeflowCallback)
    return trainer
