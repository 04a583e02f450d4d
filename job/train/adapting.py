"""What of the model is trained, and the step by which it is."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from job import log
from job.engines.base import Engine
from job.errors import DataError, InputError, StorageError
from job.families.base import Family
from job.prep.rows import Row
from job.spec.types import JobSpec


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A model that is ready to be trained."""

    model: Any
    base: Any
    """The model itself, which an adapter is around; without an adapter the same."""
    targets: dict[str, int]
    """How many layers each target of `lora` adapts; of full fine-tuning none."""
    padding_free: bool
    """Whether it takes the rows of a batch as one sequence."""
    trainable_parameters: int
    total_parameters: int


def require(spec: JobSpec) -> None:
    """Raises SpecError where the spec asks to train what the model does not have.

    By its architecture alone: names and shapes without weights. A model that cannot be read is
    left to whoever reads it.
    """
    from job import families

    try:
        family, skeleton = families.architecture(spec.model)
    except (InputError, StorageError):
        return
    if spec.lora.method == "lora":
        family.lora_targets(skeleton, spec.lora)
    family.set_router_aux_loss(skeleton, spec.train.router_aux_loss_coef)


VISION = ("vision attention", "vision mlp", "connector", "resampler")
"""The kinds of targets that a row without an image passes by."""


def require_images(ready: Adapted, rows: Iterable[Row]) -> None:
    """Raises DataError where vision alone is trained, and none of the rows has an image."""
    if ready.targets and ready.targets.keys() <= {*VISION} and not any(row.images for row in rows):
        raise DataError(
            "$.data.train",
            f"no row to train has an image, and what is trained sees nothing else: "
            f"{', '.join(ready.targets)}",
            fix="set lora.finetune_language_layers: true, or name rows with images",
        )


def adapted(spec: JobSpec, engine: Engine, family: Family, model: Any) -> Adapted:
    """Gives the model its adapter, or has all of it trained, and the step that the spec asks for.

    Raises SpecError where `lora` names what the model has not.
    """
    packs = spec.train.padding_free and family.supports_packing
    padding_free = packs and not engine.brings_forward
    if padding_free:
        family.use_packed_step(model, varlen=spec.model.attn_implementation == "auto")
    elif packs:
        log.info("rows are padded: the engine has a step of its own", engine=engine.name)
    elif spec.train.padding_free:
        log.info("rows are padded: the model's family has no padding-free step", family=family.name)
    targets: dict[str, int] = {}
    if spec.lora.method == "lora":
        resolved = family.lora_targets(model, spec.lora)
        targets = resolved.counts
        model = engine.attach_adapter(model, resolved, spec.lora, spec.train.seed)
    else:
        model.requires_grad_(True)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family.set_router_aux_loss(base, spec.train.router_aux_loss_coef)
    return Adapted(
        model=model,
        base=base,
        targets=targets,
        padding_free=padding_free,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
    )
