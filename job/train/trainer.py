"""The train stage: a model, its data and the spec in; a trained adapter (or model) out."""

import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import log, signals, telemetry
from job.engines.base import Engine
from job.engines.device import Accelerator, resolve_optim
from job.engines.waiting import Waiting
from job.errors import OutOfMemoryError, Stopped
from job.families.base import COUNTED, Family, to_device
from job.prep.prepare import PreparedData
from job.prep.records import Row
from job.prep.streaming import StreamedRows
from job.redaction import redact
from job.spec.types import JobSpec, TrainSpec
from job.train import passes
from job.train.checkpoints import CheckpointStore
from job.train.dataset import Collator, EncodedDataset, Fitted, fit, label_proof, truncate
from job.train.lengths import LENGTHS, lengths
from job.train.order import SharedBatches, Windows, shuffled
from job.train.trackers import TrackerFiles
from job.train.uploads import BackgroundUploads

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from job.train.ahead import Ahead

ADAPTER, SERVED_ADAPTER, WEIGHTS, TRAIN = "adapter", "adapter-vllm", "weights", "train"
LABEL_PROOF = "label_proof.json"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What training did; its files are under the stage's directory."""

    steps: int
    fit: dict[str, Any] | None
    """How the rows of a step were divided so that they fit, and what was too large; None where
    nothing was tried."""
    processes: int
    rows_a_step: int
    """At most, over all forward passes and processes."""
    resumed_from_step: int
    epochs: float
    rows: int
    dropped_rows: int
    first_loss: float
    final_loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    data_wait_seconds: float
    """A step that rank 0 waited for its batches, the mean of this session."""
    data_wait_share: float
    """Of `seconds`, 0 to 1."""
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    optim: str
    lora_targets: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train(
    spec: JobSpec,
    engine: Engine,
    accelerator: Accelerator,
    family: Family,
    model: Any,
    data: PreparedData,
    directory: Path,
    scratch: Path,
    store: CheckpointStore,
    *,
    publish: Callable[[str], None],
    tell: Callable[[telemetry.Step], None],
    trackers: TrackerFiles,
) -> tuple[Any, TrainResult | None]:
    """Trains `model` and leaves the adapter (or the weights), proof and history in `directory`.

    `publish` stores a file of `directory` at once: the label proof is there before step 1; `tell`
    hears of every step that is logged. Gives the trained model and what was done. Raises DataError
    where a batch trains nothing, OutOfMemoryError where a step does not fit, and Stopped after
    SIGTERM with the checkpoint stored.

    Of several processes that form a group all have to call it; rank 0 alone writes, and is given
    the result.
    """
    from job.engines import group, sharding
    from job.engines.compiling import compile_blocks, release_blocks
    from job.train.callbacks.progress import ProgressCallback
    from job.train.callbacks.stop import StopCallback
    from job.train.callbacks.store import StoreCallback

    first = group.rank() == 0
    optim = resolve_optim(spec.train, accelerator)
    rows = data.rows("train")
    fitted = fit(data.measured_rows(), family, spec.data, spec.train)
    encode = functools.partial(_encode, family=family, spec=spec)
    dataset = EncodedDataset(rows, fitted, encode)
    notes = directory / TRAIN
    measured = lengths(fitted.measured, spec.train.max_length)
    if first:
        notes.mkdir(parents=True, exist_ok=True)
        measured_only = EncodedDataset(data.measured_rows(), fitted, encode)
        _prove_labels(measured_only, family, notes)
        publish(f"{TRAIN}/{LABEL_PROOF}")
        (notes / LENGTHS).write_text(json.dumps(measured, indent=2) + "\n")
        publish(f"{TRAIN}/{LENGTHS}")

    padding_free = spec.train.padding_free and family.packs
    if padding_free:
        family.use_packed_step(model)
    elif spec.train.padding_free:
        log.info("rows are padded: the model's family has no padding-free step", family=family.name)
    targets: dict[str, int] = {}
    if spec.lora.method == "lora":
        resolved = family.lora_targets(model, spec.lora)
        targets = resolved.counts
        model = engine.attach_adapter(model, resolved, spec.lora, spec.train.seed)
    else:
        model.requires_grad_(True)
    family.set_router_aux_loss(_base(model), spec.train.router_aux_loss_coef)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    log.info(
        "training",
        rows=len(dataset),
        tokens_a_row=measured["tokens_a_row"]["mean"],
        longest=measured["tokens_a_row"]["max"],
        over_max_length=f"{measured['over_max_length']['share']:.2%}",
        dropped=fitted.dropped,
        trainable=f"{trainable:,} of {total:,} ({trainable / total:.2%})",
        optim=optim,
        device=accelerator.name,
    )

    if spec.train.torch_compile:  # before the trial, which is to compute what will be trained
        log.info("blocks are compiled when they are first computed", blocks=compile_blocks(model))
    collator = Collator(family, padding_free=padding_free)
    spec, fit_record = _fitted_to_memory(spec, engine, accelerator, collator, model, dataset)
    uploads, waiting = BackgroundUploads(), Waiting()
    progress = ProgressCallback(accelerator, notes / "history.jsonl", tell, waiting)
    callbacks: list[TrainerCallback] = [StopCallback()]
    if first:
        trackers.point()
        callbacks += [StoreCallback(store, spec.train.save_total_limit, uploads), progress]
    if group.leads_machine():
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left there
    resumed = _resume_point(spec.train, store, scratch)
    shares = sharding.config(_base(model)) if spec.runtime.distributed == "fsdp2" else None
    arguments = _arguments(spec, optim, engine, scratch, padding_free, first, shares)
    batches = _batches(spec, rows, fitted, padding_free=padding_free)
    trainer = _trainer(engine, model, dataset, arguments, collator, batches, waiting, callbacks)
    started = time.monotonic()
    try:
        with signals.deferred(), trackers if first else nullcontext(), uploads:
            outcome = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except (RuntimeError, MemoryError) as error:
        _raise_if_out_of_memory(error, spec.train, accelerator)
        raise
    finally:
        progress.close()
        if spec.train.torch_compile:
            release_blocks(model)
        # Its shapes are training's: generation feeds one token at a time.
        family.set_router_aux_loss(_base(model), 0)
    seconds = time.monotonic() - started
    if signals.received():
        raise Stopped(
            str(signals.received()),
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
            f"the checkpoint of step {uploads.stored_step} is stored",
            fix="run the same spec again; it resumes from there",
        )
    model = _finish(spec, family, trainer, directory if first else None)
    group.barrier()
    if group.leads_machine():
        shutil.rmtree(scratch, ignore_errors=True)
    if not first:
        return None, None

    history = [json.loads(line) for line in (notes / "history.jsonl").read_text().splitlines()]
    done = [entry["step"] for entry in history]
    first_step = _step_of(resumed)
    steps = trainer.state.global_step - first_step
    tokens = trainer.state.num_input_tokens_seen
    result = TrainResult(
        steps=trainer.state.global_step,
        fit=fit_record,
        processes=group.size(),
        rows_a_step=spec.train.per_device_train_batch_size
        * spec.train.gradient_accumulation_steps
        * group.size(),
        resumed_from_step=first_step,
        epochs=round(trainer.state.epoch or 0.0, 4),
        rows=len(dataset),
        dropped_rows=fitted.dropped,
        first_loss=history[0]["loss"] if done else math.nan,
        final_loss=history[-1]["loss"] if done else math.nan,
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(_speed(outcome, trainer, seconds), 1),
        data_wait_seconds=round(waiting.seconds / max(steps, 1), 4),
        data_wait_share=round(waiting.seconds / max(seconds, 1e-9), 4),
        peak_memory_bytes=accelerator.peak_memory_bytes(),
        trainable_parameters=trainable,
        total_parameters=total,
        optim=optim,
        lora_targets=targets,
    )
    return model, result


def _finish(spec: JobSpec, family: Family, trainer: "Trainer", directory: Path | None) -> Any:
    """The trained model, stored in `directory` by who has one; None where it is in shares."""
    from job.engines import sharding

    model = trainer.model
    if sharding.is_sharded(model):
        state = sharding.trained_state(model)
        if directory is not None:
            _store_weights(spec, family, model, state, directory)
        return None
    # Autocast ends with training: what is compared with the stored weights computes as they do.
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if directory is not None:
        _store_weights(spec, family, model, None, directory)
    return model.eval()


def _fitted_to_memory(
    spec: JobSpec,
    engine: Engine,
    accelerator: Accelerator,
    collate: Collator,
    model: Any,
    dataset: EncodedDataset,
) -> tuple[JobSpec, dict[str, Any] | None]:
    """The spec with its step divided so that it fits, and what there is to keep of the trial.

    Raises OutOfMemoryError where nothing fits.
    """
    from job.train import fitting

    wanted = spec.train.fit == "on" or (spec.train.fit == "auto" and accelerator.kind != "cpu")
    if not wanted or spec.runtime.distributed == "fsdp2":  # which fits only once it is in shares
        return spec, None

    def fits(division: fitting.Division) -> bool:
        def make() -> dict[str, Any]:
            rows = fitting.largest(dataset.lengths, division.per_device_train_batch_size)
            batch = collate.batch([dataset.row(row) for row in rows])
            del batch[COUNTED]
            return to_device(batch, engine.device)

        return fitting.fits(model, make, engine, division)

    start = fitting.Division.of(spec.train)
    found, too_large = fitting.find(start, fits)
    if found is None:
        raise OutOfMemoryError(
            "$.train.per_device_train_batch_size",
            f"no step fits into the {log.size(accelerator.memory_bytes)} of {accelerator.name}: "
            f"tried {'; '.join(map(str, too_large))}",
            value=spec.train.per_device_train_batch_size,
            fix="lower data.max_pixels or train.max_length",
        )
    log.info("a step fits into memory", tried=found)
    train = replace(spec.train, **asdict(found))
    return replace(spec, train=train), fitting.record(found, too_large)


def _prove_labels(dataset: EncodedDataset, family: Family, notes: Path) -> None:
    proof = label_proof(dataset.row(0), family)
    (notes / LABEL_PROOF).write_text(json.dumps(proof, indent=2, ensure_ascii=False) + "\n")
    log.info("trained tokens are marked ⟦⟧", row=proof["row"], text=proof["marked"])


def _encode(row: Any, *, family: Family, spec: JobSpec) -> Any:
    return truncate(family.encode(row), family, spec.data, spec.train)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _arguments(
    job: JobSpec,
    optim: str,
    engine: Engine,
    scratch: Path,
    padding_free: bool,
    first: bool,
    fsdp_config: dict[str, Any] | None,
) -> "TrainingArguments":
    from transformers import TrainingArguments

    spec = job.train
    return TrainingArguments(
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
        include_num_input_tokens_seen="all" if padding_free else "non_padding",
        report_to=(list(spec.report_to) if first else []) or "none",
        run_name=job.name,
        disable_tqdm=True,
        log_level="error",
    )


def _batches(
    spec: JobSpec, rows: Sequence[Row], fitted: Fitted, *, padding_free: bool
) -> "SharedBatches | Ahead":
    """This process's batches of an epoch, in an order that suits how the rows are kept."""
    from job.engines import group
    from job.train.ahead import Ahead

    count, buffer = len(fitted.indices), spec.data.shuffle_buffer_size
    streamed = rows if isinstance(rows, StreamedRows) else None
    width = spec.train.per_device_train_batch_size
    cut = passes.in_order(width)
    if spec.train.group_by_length:
        grouped = passes.balanced if padding_free else passes.alike
        cut = grouped(width, fitted.lengths)
    batches = SharedBatches(
        Windows(count, fitted.starts(streamed.blocks()), buffer, seed=spec.train.seed)
        if streamed
        else shuffled(count, spec.train.seed),
        width,
        passes=spec.train.gradient_accumulation_steps,
        process=group.rank(),
        processes=group.size(),
        cut=cut,
    )
    if streamed is None or not group.leads_machine():
        return batches
    return Ahead(batches, streamed, fitted.indices, buffer // group.size())


def _trainer(
    engine: Engine,
    model: Any,
    dataset: EncodedDataset,
    arguments: "TrainingArguments",
    collator: Collator,
    batches: "SharedBatches | Ahead",
    waiting: Waiting,
    callbacks: "list[TrainerCallback]",
) -> "Trainer":
    from transformers.integrations import KubeflowCallback
    from transformers.trainer_callback import PrinterCallback

    from job.train.resumable import resumable

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


def _resume_point(spec: TrainSpec, store: CheckpointStore, scratch: Path) -> Path | None:
    """The checkpoint to go on from, fetched once on every machine; None to start anew.

    Rank 0 chooses it, for all.
    """
    from job.engines import group

    uri = None
    if group.rank() == 0:
        uri = _checkpoint_to_take(spec, store, scratch / "resume")
    uri = group.from_first(uri)
    if uri is None:
        return None
    found = scratch / "resume"
    if group.leads_machine() and group.rank() > 0:
        store.fetch(uri, found)
    group.barrier()
    state = json.loads((found / "trainer_state.json").read_text())
    named = found.with_name(f"checkpoint-{state['global_step']}")
    group.barrier()
    if group.leads_machine():
        found.rename(named)
    group.barrier()
    log.info("resuming", step=state["global_step"])
    return named


def _checkpoint_to_take(spec: TrainSpec, store: CheckpointStore, directory: Path) -> str | None:
    """The URI of the checkpoint to go on from, which is fetched into `directory`."""
    if spec.resume_from_checkpoint == "never":
        return None
    if spec.resume_from_checkpoint != "auto":
        store.fetch(spec.resume_from_checkpoint, directory)
        return spec.resume_from_checkpoint
    return store.latest(directory)


def _step_of(resumed: Path | None) -> int:
    return int(resumed.name.rpartition("-")[2]) if resumed else 0


def _speed(outcome: Any, trainer: Any, seconds: float) -> float:
    """Tokens a second of this session, without what was trained before a resume."""
    before = getattr(trainer, "_initial_num_input_tokens_seen", 0)
    return float((trainer.state.num_input_tokens_seen - before) / max(seconds, 1e-9))


def _store_weights(
    spec: JobSpec, family: Family, model: Any, state: dict[str, Any] | None, directory: Path
) -> None:
    """Stores what was trained; where the model is in shares `state` is the adapter, whole."""
    if spec.lora.method == "lora":
        _store_adapter(spec, model, state, directory / ADAPTER)
        if not family.adapter_serving(spec.lora).merged_only:
            family.write_served_adapter(directory / ADAPTER, directory / SERVED_ADAPTER)
        return
    family.save(
        model,
        ((name, parameter.detach().cpu()) for name, parameter in model.named_parameters()),
        directory / WEIGHTS,
        dtype=next(model.parameters()).dtype,
        max_shard_size=spec.export.merged.max_shard_size,
        layout="transformers",
    )


def _store_adapter(
    spec: JobSpec, model: Any, state: dict[str, Any] | None, directory: Path
) -> None:
    model.save_pretrained(directory, safe_serialization=True, state_dict=state)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty form
    # PEFT writes sets in the order of the day; equal adapters shall be equal files.
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    # Named only now: PEFT would go and look the name up at the hub.
    config["base_model_name_or_path"] = redact(spec.model.model_name_or_path).removeprefix("hf://")
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _raise_if_out_of_memory(
    error: BaseException, spec: TrainSpec, accelerator: Accelerator
) -> None:
    from job.train.fitting import is_out_of_memory

    if not is_out_of_memory(error):
        return
    rows = spec.per_device_train_batch_size
    raise OutOfMemoryError(
        "$.train.per_device_train_batch_size",
        f"a training step does not fit into the {log.size(accelerator.memory_bytes)} "
        f"of {accelerator.name}",
        value=rows,
        fix=(
            f"--set train.per_device_train_batch_size={max(1, rows // 2)} "
            f"--set train.gradient_accumulation_steps={spec.gradient_accumulation_steps * 2}"
            if rows > 1
            else "--set train.gradient_checkpointing=true, or lower data.max_pixels"
        ),
    ) from error
