"""The train stage: a model, its data and the spec in; a trained adapter (or model) out."""

import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import log, signals, telemetry
from job.engines.base import Engine
from job.engines.data_timer import Waiting
from job.engines.device import Accelerator, resolve_optim
from job.errors import Stopped
from job.families.base import Family
from job.prep.prepared_data import PreparedData
from job.redaction import as_json
from job.spec.types import JobSpec, TrainSpec
from job.train.adapting import adapted, require_images
from job.train.batch_size_finder import fitted_to_memory, raise_if_out_of_memory
from job.train.checkpoint.contents import problem
from job.train.checkpoint.resume import resume_point, step_of
from job.train.checkpoint.storage import CheckpointStore
from job.train.checkpoint.uploads import BackgroundUploads
from job.train.dataset import Collator, EncodedDataset, fit, label_proof, truncate
from job.train.gc_freeze import spared
from job.train.heaviest_batches import planned
from job.train.lengths import LENGTHS, lengths
from job.train.outputs import finish
from job.train.trackers import TrackerFiles
from job.train.trainer_setup import (
    batches_of,
    make_trainer,
    order_of,
    schedule_of,
    training_arguments,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback


TRAIN = "train"
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
    """Of training alone, as `plan` estimates it."""
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
    require: Callable[[], None],
    tell: Callable[[telemetry.Step], None],
    trackers: TrackerFiles,
) -> tuple[Any, TrainResult | None]:
    """Trains `model` and leaves the adapter (or the weights), proof and history in `directory`.

    `publish` stores a file of `directory` at once: the label proof is there before step 1;
    `require` raises where another job has taken the output; `tell` hears of every step that is
    logged. Gives the trained model and what was done. Raises DataError
    where a batch trains nothing, OutOfMemoryError where a step does not fit, and Stopped after
    SIGTERM with the checkpoint stored.

    Of several processes that form a group all have to call it; rank 0 alone writes, and is given
    the result.
    """
    from job.distributed import process_group
    from job.engines import sharding
    from job.engines.compiling import compile_blocks, release_blocks
    from job.train.callbacks.checkpoint import StoreCallback
    from job.train.callbacks.progress import ProgressCallback
    from job.train.callbacks.stop import StopCallback

    first = process_group.rank() == 0
    optim = resolve_optim(spec.train, accelerator)
    measured_rows = data.measured_rows()
    rows = data.rows("train") if data.full_shards else measured_rows
    fitted = fit(measured_rows, family, spec.data, spec.train)
    encode = functools.partial(_encode, family=family, spec=spec)
    dataset = EncodedDataset(rows, fitted, encode)
    notes = directory / TRAIN
    measured = lengths(fitted.measured, spec.train.max_length)
    if first:
        notes.mkdir(parents=True, exist_ok=True)
        _prove_labels(EncodedDataset(measured_rows, fitted, encode), family, notes)
        publish(f"{TRAIN}/{LABEL_PROOF}")
        (notes / LENGTHS).write_text(as_json(measured, indent=2) + "\n", encoding="utf-8")
        publish(f"{TRAIN}/{LENGTHS}")

    ready = adapted(spec, engine, family, model)
    require_images(ready, measured_rows)
    model, padding_free = ready.model, ready.padding_free
    trainable, total = ready.trainable_parameters, ready.total_parameters
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

    compiles = spec.train.torch_compile and not engine.brings_forward
    if compiles:  # before the trial, which is to compute what will be trained
        blocks = compile_blocks(model, wide=not engine.autocast)
        log.info("blocks are compiled when they are first computed", blocks=blocks)
    collator = Collator(family, padding_free=padding_free)

    def passes(train: TrainSpec) -> Iterator[list[int]]:
        order = order_of(replace(spec, train=train), rows, fitted, padding_free=padding_free)
        return planned(order, train)

    with _loss(spec, engine, ready.base):
        spec, fit_record = fitted_to_memory(
            spec, engine, accelerator, collator, model, dataset, passes
        )
    accelerator.reset_peak_memory()  # of training, not of an evaluation or a trial before it
    uploads, waiting = BackgroundUploads(), Waiting()
    progress = ProgressCallback(accelerator, notes / "history.jsonl", tell, waiting)
    batches = batches_of(spec, rows, fitted, padding_free=padding_free)
    store = replace(store, schedule=schedule_of(spec.train, batches))
    callbacks: list[TrainerCallback] = [StopCallback()]
    if first:
        trackers.point()
        keep = spec.train.save_total_limit
        callbacks += [StoreCallback(store, keep, uploads, require), progress]
    if process_group.is_local_rank_zero():
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left there
    shares = sharding.config(ready.base) if spec.runtime.distributed == "fsdp2" else None
    arguments = training_arguments(spec, optim, engine, scratch, first, shares)
    trainer = make_trainer(engine, model, dataset, arguments, collator, batches, waiting, callbacks)
    resumed = resume_point(spec.train, store, scratch, functools.partial(problem, trainer=trainer))
    started = time.monotonic()
    try:
        told = trackers if first else nullcontext()
        with signals.deferred(), told, uploads, spared(), _loss(spec, engine, ready.base):
            outcome = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except (RuntimeError, MemoryError) as error:
        raise_if_out_of_memory(error, spec.train, accelerator)
        raise
    finally:
        progress.close()
        family.set_router_aux_loss(ready.base, 0)
    seconds = time.monotonic() - started
    if signals.received():
        raise Stopped(
            str(signals.received()),
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
            f"the checkpoint of step {uploads.stored_step or step_of(resumed)} is stored",
            fix="run the same spec again; it resumes from there",
        )
    if first and resumed and trainer.state.global_step == step_of(resumed):
        log.info("nothing was left to train", step=trainer.state.global_step)
        require()
        store.prune(spec.train.save_total_limit, trainer.state.global_step)
    if compiles:  # their shapes are training's: generation feeds one token at a time
        release_blocks(model)
    model = finish(spec, family, trainer, directory if first else None)
    process_group.barrier()
    if process_group.is_local_rank_zero():
        shutil.rmtree(scratch, ignore_errors=True)
    if not first:
        return None, None

    history = [json.loads(line) for line in (notes / "history.jsonl").read_text().splitlines()]
    done = [entry["step"] for entry in history]
    first_step = step_of(resumed)
    steps = trainer.state.global_step - first_step
    tokens = trainer.state.num_input_tokens_seen
    result = TrainResult(
        steps=trainer.state.global_step,
        fit=fit_record,
        processes=process_group.size(),
        rows_a_step=spec.train.per_device_train_batch_size
        * spec.train.gradient_accumulation_steps
        * process_group.size(),
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
        lora_targets=ready.targets,
    )
    return model, result


def _prove_labels(dataset: EncodedDataset, family: Family, notes: Path) -> None:
    proof = label_proof(dataset.row(0), family)
    (notes / LABEL_PROOF).write_text(as_json(proof, indent=2) + "\n", encoding="utf-8")
    log.info("trained tokens are marked ⟦⟧", row=proof["row"], text=proof["marked"])


def _encode(row: Any, *, family: Family, spec: JobSpec) -> Any:
    return truncate(family.encode(row), family, spec.data, spec.train)


def _loss(spec: JobSpec, engine: Engine, base: Any) -> AbstractContextManager[Any]:
    """Within, the loss is made of supervised tokens alone where that is not so by itself."""
    from job.families.supervised_logits import supervised_logits_only

    # A head in shares is gathered by its own forward pass.
    if engine.brings_forward or spec.runtime.distributed == "fsdp2":
        return nullcontext()
    return supervised_logits_only(base)


def _speed(outcome: Any, trainer: Any, seconds: float) -> float:
    """Tokens a second of this session, without what was trained before a resume."""
    before = getattr(trainer, "_initial_num_input_tokens_seen", 0)
    return float((trainer.state.num_input_tokens_seen - before) / max(seconds, 1e-9))
