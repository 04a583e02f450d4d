"""Prepares a model for training: attaches the adapter, and selects the packed step and the loss."""

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job import log
from job.engines.base import Engine
from job.engines.padding_free import why_padded
from job.errors import DataError, InputError, SpecError, StorageError
from job.families.base import Family
from job.families.lora.target_groups import LoraTargets
from job.families.step_flops import VISION
from job.families.vision_tower import vision_tower_pattern
from job.prep.rows import Row
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from job.engines.stored_adapter import StoredAdapter


@dataclass(frozen=True, kw_only=True)
class AdaptedModel:
    """A model that is ready for training."""

    model: "PreTrainedModel | PeftModel"
    base: "PreTrainedModel"
    """The model inside the adapter; `model` itself without an adapter."""
    targets: dict[str, int]
    """How many layers of each target group are adapted; empty for full fine-tuning."""
    padding_free: bool
    """Whether micro-batches are packed: all rows in one sequence, without padding."""
    trainable_parameters: int
    total_parameters: int


def require(spec: JobSpec, start: "StoredAdapter | None" = None) -> None:
    """Raises SpecError if the spec trains parts that the model, or the adapter `start`, lacks.

    Reads the architecture only: names and shapes, no weights. A model that cannot be read is
    reported later, by the stage that loads it.
    """
    from job import families

    try:
        family, skeleton = families.architecture(spec.model)
    except (InputError, StorageError):
        return
    targets = family.lora_targets(skeleton, spec.lora) if spec.lora.method == "lora" else None
    if start is not None:
        from job.engines.adapter_fit import require_fit

        require_fit(start, spec.lora, functools.partial(family.lora_targets, skeleton))
    if spec.reinforce is not None and targets is not None:
        _require_plain_output_layer(skeleton, targets)
    if spec.train.vision_tower_lr is not None:
        _require_trained_vision_tower(spec, skeleton, targets)
    family.set_router_aux_loss(skeleton, spec.train.router_aux_loss_coef)


def _require_plain_output_layer(skeleton: "PreTrainedModel", targets: LoraTargets) -> None:
    """Raises SpecError if the output layer has an adapter, which TRL's GRPO refuses."""
    head = skeleton.get_output_embeddings()
    names = [name for name, module in skeleton.named_modules() if module is head]
    if adapted := {*names} & {*targets.modules}:
        name = min(adapted)
        raise SpecError(
            "$.lora.target_modules",
            f"adapts the output layer, {name}, which TRL's GRPO does not train",
            fix=f"leave {name} out of lora.target_modules, or remove the section reinforce",
        )


def _require_trained_vision_tower(
    spec: JobSpec, skeleton: "PreTrainedModel", targets: LoraTargets | None
) -> None:
    """Raises SpecError if no weight of a vision tower is trained; `targets` is None for all."""
    pattern = vision_tower_pattern(skeleton)
    trained = () if targets is None else (*targets.modules, *targets.parameters)
    if pattern is None:
        reason, fix = "does not apply: the model has no vision tower", "remove the line"
    elif targets is not None and not any(map(pattern.match, trained)):
        reason = "does not apply: lora selects nothing in the vision tower"
        fix = "remove the line, or select modules of the vision tower"
    else:
        return
    raise SpecError("$.train.vision_tower_lr", reason, value=spec.train.vision_tower_lr, fix=fix)


def require_images(adapted: AdaptedModel, rows: Iterable[Row]) -> None:
    """Raises DataError if only vision layers are trained and no row has an image."""
    targets = adapted.targets
    if targets and targets.keys() <= {*VISION} and not any(row.images for row in rows):
        raise DataError(
            "$.data.train",
            f"no training row has an image, but only vision layers are trained: "
            f"{', '.join(targets)}",
            fix="set lora.finetune_language_layers: true, or name rows with images",
        )


def adapt(
    spec: JobSpec,
    engine: Engine,
    family: Family,
    model: "PreTrainedModel",
    start: "StoredAdapter | None" = None,
) -> AdaptedModel:
    """Attaches the adapter, or unfreezes the model; enables the packed step and the auxiliary loss.

    The adapter is a new one, or has the values of `start`.

    Raises SpecError if `lora` names modules that the model does not have.
    """
    from job.families.lora.gate_up import untrained_zeros

    padded = why_padded(spec, family, patches_forward=engine.patches_forward)
    if padded is None:
        family.use_packed_step(model, varlen=spec.model.attn_implementation == "auto")
    elif spec.train.padding_free:
        log.info(f"rows are padded: {padded}")
    targets: dict[str, int] = {}
    trained: PreTrainedModel | PeftModel = model
    if spec.lora.method == "lora":
        resolved = family.lora_targets(model, spec.lora)
        targets = resolved.counts
        trained = engine.attach_adapter(model, resolved, spec.lora, spec.train.seed)
        if start is not None:
            from job.engines.stored_adapter import load_into

            load_into(trained, start)
    else:
        trained.requires_grad_(True)
    base = trained.get_base_model() if hasattr(trained, "get_base_model") else trained
    family.set_router_aux_loss(base, spec.train.router_aux_loss_coef)
    return AdaptedModel(
        model=trained,
        base=base,
        targets=targets,
        padding_free=padded is None,
        trainable_parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad)
        - untrained_zeros(trained),
        total_parameters=sum(p.numel() for p in trained.parameters()),
    )


def loss_of_supervised_tokens(
    spec: JobSpec, engine: Engine, base: "PreTrainedModel"
) -> AbstractContextManager[object]:
    """A context in which training computes logits of supervised tokens only, if the model can."""
    from job.families.supervised_logits import supervised_logits_only

    # An engine may have its own loss; a sharded head is gathered only in its own forward pass.
    if engine.patches_forward or spec.shards_weights:
        return nullcontext()
    return supervised_logits_only(base)
