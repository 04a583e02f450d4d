"""Finds the fastest way to compute a step that fits into memory, before the first step.

Runs the heaviest micro-batches of the whole training forward and backward: first all rows of a step
in one pass, with its activations kept, then what takes less memory. The rows of an optimizer step
stay the same.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from job import log
from job.distributed import process_group
from job.engines.device import Accelerator, release_memory
from job.errors import OutOfMemoryError
from job.spec.types import JobSpec, TrainSpec
from job.train.out_of_memory import FIELD
from job.train.pass_candidates import (
    BatchSettings,
    candidates,
    job_may_checkpoint,
    searches,
    without_search,
)
from job.train.trial import Trial


def find_batch_size(
    spec: JobSpec, accelerator: Accelerator, trial: Trial
) -> tuple[JobSpec, dict[str, Any] | None]:
    """The spec with passes that fit, and the search's record for run.json; None if skipped.

    In the result, `gradient_checkpointing` and `torch_compile` are true or false. Without a search,
    `gradient_checkpointing: auto` is false only if the memory estimate leaves ample room.

    Raises OutOfMemoryError if nothing fits.
    """
    train, on_gpu = spec.train, accelerator.kind != "cpu"
    sharded = spec.shards_weights
    if not searches(train, on_gpu=on_gpu, sharded=sharded):
        settings = _without_search(train, accelerator, trial, sharded=sharded)
        return _resolved(spec, settings, trial), None
    pass_tokens = functools.partial(trial.pass_tokens, train)
    # Processes have different rows: rank 0's decide, because all have to try the same.
    ways = process_group.broadcast(
        candidates(train, pass_tokens, on_gpu=on_gpu, captured=trial.captured)
    )

    def fitting(way: BatchSettings) -> bool:
        last_resort = way == ways[-1]  # the estimate does not refuse a job
        if not last_resort and trial.is_ruled_out(train, way, accelerator):
            return False
        fits = trial.fits(train, way)
        release_memory()  # the failed step's tensors: its error and frames are gone by now
        if not fits:
            log.info("a step does not fit into memory", tried=way)
        return fits

    found, refused = first_that_fits(ways, fitting)
    too_large = [way for way in refused if way not in trial.ruled_out]
    if found is None:
        raise OutOfMemoryError(
            FIELD,
            f"no step fits into the {log.size(accelerator.memory_bytes)} of {accelerator.name}: "
            f"tried {'; '.join(map(str, too_large))}",
            value=train.per_device_train_batch_size,
            fix=_fix(train),
        )
    if process_group.any_rank(train.torch_compile is not False and trial.blocks is None):
        trial.release_blocks()
    log.info(
        "a step fits into memory",
        passes=found,
        spec=f"{train.per_device_train_batch_size} × {train.gradient_accumulation_steps}",
        too_large=len(too_large),
        ruled_out=len(trial.ruled_out),
    )
    record = {
        **asdict(found),
        "too_large": [asdict(each) for each in too_large],
        "ruled_out": [asdict(each) for each in trial.ruled_out],
    }
    return _resolved(spec, found, trial), record


def first_that_fits(
    ways: Sequence[BatchSettings], fits: Callable[[BatchSettings], bool]
) -> tuple[BatchSettings | None, list[BatchSettings]]:
    """The first of the ways that fits on all processes, or None; and those that were too large."""
    too_large: list[BatchSettings] = []
    for way in ways:
        if not process_group.any_rank(not fits(way)):
            return way, too_large
        too_large.append(way)
    return None, too_large


def _without_search(
    train: TrainSpec, accelerator: Accelerator, trial: Trial, *, sharded: bool
) -> BatchSettings:
    """The spec's passes, with gradient checkpointing if it is `auto` and they may not fit."""

    def is_safe(kept: BatchSettings) -> bool:
        unsafe = sharded or not trial.is_safe(train, kept, accelerator)
        return not process_group.any_rank(unsafe)

    settings = without_search(train, is_safe)
    if job_may_checkpoint(train):
        log.info("a step is not tried before training", passes=settings)
    return settings


def _resolved(spec: JobSpec, settings: BatchSettings, trial: Trial) -> JobSpec:
    compiled = not settings.gradient_checkpointing and (
        trial.blocks is not None or spec.train.torch_compile is True
    )
    return replace(spec, train=replace(settings.of_spec(spec.train), torch_compile=compiled))


def _fix(train: TrainSpec) -> str:
    if train.torch_compile is True and train.gradient_checkpointing == "auto":
        return "set train.torch_compile: auto, or lower data.max_pixels or train.max_length"
    if train.gradient_checkpointing is False:
        return "set train.gradient_checkpointing: auto, or lower data.max_pixels"
    return "lower data.max_pixels or train.max_length"
