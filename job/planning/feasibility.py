"""Finds the smallest change of settings with which training fits an accelerator."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from job.engines.device import Accelerator
from job.engines.memory import MemoryEstimate, estimate
from job.families.base import Family
from job.families.encoded import RowSize
from job.planning.sample import worst_batch
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_LENGTH = 256
"""The shortest `max_length` to suggest, in tokens."""
MIN_PIXELS = 56 * 56
"""The lowest `max_pixels` to suggest: smaller images are illegible."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Settings with which training fits, and the memory that it takes with them."""

    settings: Mapping[str, Any]
    memory: MemoryEstimate


def nearest_change(
    family: type[Family],
    model: "PreTrainedModel",
    spec: JobSpec,
    sizes: Sequence[RowSize],
    accelerator: Accelerator,
    processes: int = 1,
) -> Change | None:
    """The first change that fits, trying those that do not affect the result first.

    In order: smaller micro-batches with more accumulation, gradient checkpointing, smaller images
    and shorter rows, fewer trained weights. Returns None if no change makes it fit. `processes`
    divide what the spec shards.
    """
    if spec.train.torch_compile is True and spec.train.gradient_checkpointing == "auto":
        # Compiled blocks exclude it, so training would not turn it on.
        spec = replace(spec, train=replace(spec.train, gradient_checkpointing=False))
    for settings, batch in _changes(model, spec, sizes):
        changed = _with_settings(spec, settings)
        memory = estimate(family, model, changed, batch, accelerator, processes=processes)
        if memory is not None and memory.fits(accelerator.memory_bytes):
            return Change(settings=settings, memory=memory)
    return None


def _changes(
    model: "PreTrainedModel", spec: JobSpec, sizes: Sequence[RowSize]
) -> Iterator[tuple[dict[str, Any], tuple[RowSize, ...]]]:
    smaller = list(_smaller_micro_batches(spec))
    for settings in smaller:
        yield settings, _batch(spec, sizes, settings)
    least = smaller[-1] if smaller else {}
    if not spec.train.gradient_checkpointing:
        for settings in ({}, *smaller):
            with_it = {**settings, "train.gradient_checkpointing": True}
            yield with_it, _batch(spec, sizes, settings)
        least = {**least, "train.gradient_checkpointing": True}
    for key, value, changed in _smaller_rows(model, spec, sizes):
        yield {**least, key: value}, _batch(spec, changed, least)
    for settings in _fewer_trained(spec):
        yield settings, _batch(spec, sizes, {})
        yield {**least, **settings}, _batch(spec, sizes, least)


def _smaller_micro_batches(spec: JobSpec) -> Iterator[dict[str, Any]]:
    """Half the rows and twice the accumulation steps, as often as rows divide by two."""
    rows, steps = spec.train.per_device_train_batch_size, spec.train.gradient_accumulation_steps
    while rows > 1 and rows % 2 == 0:
        rows, steps = rows // 2, steps * 2
        yield {
            "train.per_device_train_batch_size": rows,
            "train.gradient_accumulation_steps": steps,
        }


def _smaller_rows(
    model: "PreTrainedModel", spec: JobSpec, sizes: Sequence[RowSize]
) -> Iterator[tuple[str, int, list[RowSize]]]:
    vision = model.config.vision_config
    area, merge = vision.patch_size**2, vision.spatial_merge_size**2
    pixels = max((count for size in sizes for count in size.patches), default=0) * area
    while pixels // 2 >= MIN_PIXELS:
        pixels //= 2
        yield "data.max_pixels", pixels, [_shrunk(size, pixels // area, merge) for size in sizes]
    length = max(size.tokens for size in sizes)
    while length // 2 >= MIN_LENGTH:
        length //= 2
        short = [size for size in sizes if size.tokens <= length]
        yield "train.max_length", length, short or [_cut(max(sizes, key=_tokens), length)]


def _fewer_trained(spec: JobSpec) -> Iterator[dict[str, Any]]:
    if spec.lora.method == "full":
        yield {"lora.method": "lora"}
    elif spec.lora.finetune_experts:
        yield {"lora.finetune_experts": False}


def _batch(
    spec: JobSpec, sizes: Sequence[RowSize], settings: Mapping[str, Any]
) -> tuple[RowSize, ...]:
    key = "train.per_device_train_batch_size"
    return worst_batch(sizes, settings.get(key, spec.train.per_device_train_batch_size))


def _shrunk(size: RowSize, patches: int, merge: int) -> RowSize:
    """The row with its images shrunk to at most `patches`."""
    fewer = tuple(min(count, patches) for count in size.patches)
    saved = (sum(size.patches) - sum(fewer)) // merge
    return replace(
        size, tokens=size.tokens - saved, image_tokens=size.image_tokens - saved, patches=fewer
    )


def _cut(size: RowSize, length: int) -> RowSize:
    return replace(size, tokens=length, image_tokens=min(size.image_tokens, length))


def _tokens(size: RowSize) -> int:
    return size.tokens


def _with_settings(spec: JobSpec, settings: Mapping[str, Any]) -> JobSpec:
    for key, value in settings.items():
        section, _, name = key.partition(".")
        spec = replace(spec, **{section: replace(getattr(spec, section), **{name: value})})
    return spec
