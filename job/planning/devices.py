"""The devices of a plan, and whether training fits in their memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from job.engines.device import Accelerator, detect, resolve_dtype
from job.engines.memory import UNCERTAINTY, estimate, longest
from job.errors import UsageError
from job.families.base import Family
from job.families.encoded import RowSize
from job.planning import facts
from job.planning.accelerators import ACCELERATORS
from job.planning.feasibility import nearest_change
from job.planning.passes import PlannedPass, planned_pass
from job.spec.foreign_names import nearest
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

THIS_MACHINE = "this machine"

PROCESSES = (2, 4, 8, 16, 32, 64)
"""Numbers of processes that a plan tries for weights that are sharded."""


def planned_devices(name: str | None, spec: JobSpec) -> dict[str, Accelerator]:
    """The accelerator `name`; if None, this machine's, or else its CPU and all known ones."""
    if name is not None:
        if name not in ACCELERATORS:
            close = nearest(name, ACCELERATORS)
            raise UsageError(
                "--accelerator",
                "is not known",
                value=name,
                fix=f"{f'try {close}; ' if close else ''}known: {', '.join(ACCELERATORS)}",
            )
        return {name: ACCELERATORS[name].device()}
    own = detect(replace(spec.runtime, accelerator="auto"))
    if own.kind != "cpu" or spec.runtime.accelerator == "cpu":
        return {THIS_MACHINE: own}
    others = {
        name: model.device()
        for name, model in ACCELERATORS.items()
        if spec.runtime.accelerator in ("auto", model.kind)
    }
    return {**({THIS_MACHINE: own} if spec.runtime.accelerator == "auto" else {}), **others}


def memory_fit(
    family: type[Family],
    skeleton: "PreTrainedModel",
    spec: JobSpec,
    sampled: Sequence[RowSize],
    devices: Mapping[str, Accelerator],
    processes: int | None = None,
) -> facts.MemoryFit | None:
    """Peak memory of training on each device; None if the family cannot estimate it.

    Sharded weights are divided by `processes`; if None, by the fewest with which they fit.
    """
    longest_row = longest(skeleton, spec)
    rows = sampled or (longest_row,)
    tried = (1,) if not spec.shards_weights else (processes,) if processes else PROCESSES
    fits, batches = [], []
    for name, device in devices.items():
        found = _fewest_processes(family, skeleton, spec, rows, device, tried)
        if found is None:
            return None
        planned, shards = found
        batches.append(planned.batch)
        fits.append(_device_fit(family, skeleton, spec, planned, longest_row, name, device, shards))
    change = None
    if not any(fit.fits for fit in fits):
        largest = max(devices.values(), key=lambda device: device.memory_bytes)
        change = nearest_change(family, skeleton, spec, rows, largest, tried[-1])
    batch = max(batches, key=len)
    return facts.MemoryFit(
        batch_rows=len(batch),
        batch_tokens=sum(size.tokens for size in batch),
        batch_patches=sum(sum(size.patches) for size in batch),
        basis="sample" if sampled else "max_length",
        uncertainty=UNCERTAINTY,
        fits=tuple(fits),
        change=change.settings if change else None,
        change_total=change.memory.total if change else None,
    )


def _fewest_processes(
    family: type[Family],
    skeleton: "PreTrainedModel",
    spec: JobSpec,
    rows: Sequence[RowSize],
    device: Accelerator,
    tried: Sequence[int],
) -> tuple[PlannedPass, int] | None:
    """The planned pass, with the fewest processes over which sharded weights fit, or the most of
    those that are tried; None if the family cannot estimate memory."""
    found = None
    for processes in tried:
        planned = planned_pass(family, skeleton, spec, rows, device, processes)
        if planned is None:
            return None
        found = planned, processes
        if planned.memory.fits(device.memory_bytes):
            break
    return found


def _device_fit(
    family: type[Family],
    skeleton: "PreTrainedModel",
    spec: JobSpec,
    planned: PlannedPass,
    longest_row: RowSize,
    name: str,
    device: Accelerator,
    processes: int,
) -> facts.DeviceFit:
    memory, settings, batch = planned.memory, planned.settings, planned.batch
    chosen = replace(spec, train=settings.of_spec(spec.train))
    at_longest = estimate(
        family, skeleton, chosen, (longest_row,) * len(batch), device, processes=processes
    )
    assert at_longest is not None, "the family has estimated the pass"
    return facts.DeviceFit(
        accelerator=name,
        title=device.name,
        memory=device.memory_bytes,
        fits=memory.fits(device.memory_bytes),
        tight=memory.is_tight(device.memory_bytes),
        dtype=str(resolve_dtype(spec.model, spec.lora, device)).removeprefix("torch."),
        parts=memory.parts,
        total=memory.total,
        processes=processes if spec.shards_weights else None,
        loading=memory.loading,
        at_max_length=at_longest.total,
        pass_rows=settings.per_device_train_batch_size,
        passes=settings.gradient_accumulation_steps,
        gradient_checkpointing=settings.gradient_checkpointing,
        pass_tokens=sum(size.tokens for size in batch),
    )
