"""Computes the sizes of a job from its spec and the model's architecture, without weights."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job import families
from job.families import model_source
from job.families.base import LoraTargets, TargetGroup
from job.families.lora.patterns import rank_of
from job.families.lora.selection import trained_in_full
from job.spec.types import JobSpec, LoraSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
WEIGHTS, OPTIMIZER = 4, 8
"""Bytes per trained parameter in a checkpoint: the weight in fp32, and Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Counts of parameters, and bytes."""

    parameters: int
    trainable: int
    download: int
    """The checkpoint of the base model; 0 if the project ships it."""
    adapter: int
    """The adapter, or all weights after a full fine-tune."""
    checkpoint: int
    """One training checkpoint, with optimizer states."""
    merged: int
    """The merged weights; 0 if the spec asks for none."""


def measure(spec: JobSpec) -> Sizes:
    """The sizes of the job.

    Raises InputError if the model's configuration cannot be read, and SpecError if it belongs to no
    known family.
    """
    family, model = families.architecture(spec.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable, zeros = parameters, 0
    if spec.lora.method == "lora":
        targets = family.lora_targets(model, spec.lora)
        trainable = trained_parameters(model, targets, spec.lora)
        zeros = stored_zeros(model, targets, spec.lora)
    shipped = spec.model.model_name_or_path.startswith(model_source.BUILTIN)
    merged = spec.export.merged
    return Sizes(
        parameters=parameters,
        trainable=trainable,
        download=0 if shipped else parameters * BYTES["bfloat16"],
        adapter=(trainable + zeros) * WEIGHTS,
        checkpoint=(trainable + zeros) * (WEIGHTS + OPTIMIZER),
        merged=parameters * BYTES[merged.dtype] if merged.enabled else 0,
    )


def trained_parameters(model: "PreTrainedModel", targets: LoraTargets, lora: LoraSpec) -> int:
    """The number of weights that are trained with LoRA.

    They are the adapters' matrices, DoRA's magnitudes, biases by `lora.bias`, and modules trained
    in full.
    """
    adapter = sum(adapter_parameters(model, group, lora) for group in targets.groups)
    magnitudes = sum(model.get_submodule(n).out_features for n in targets.modules if lora.use_dora)
    saved = sum(parameter.numel() for parameter in trained_in_full(model, targets).values())
    return adapter + magnitudes + saved + bias_parameters(model, targets, lora)


def bias_parameters(model: "PreTrainedModel", targets: LoraTargets, lora: LoraSpec) -> int:
    """The number of the model's biases that are trained with the adapter, as PEFT selects them.

    Without those of modules trained in full.
    """
    if lora.bias == "none":
        return 0
    only = {f"{name}.bias" for name in targets.modules} if lora.bias == "lora_only" else None
    saved = trained_in_full(model, targets)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and (only is None or name in only) and name not in saved
    )


def adapter_parameters(model: "PreTrainedModel", group: TargetGroup, lora: LoraSpec) -> int:
    """r · (in + out) for a linear module; the same for each expert of a fused parameter.

    If gate and up have an adapter each, r · (2 · in + out) for each expert.
    """
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    count = sum(
        rank_of(name, lora) * (modules[name].in_features + modules[name].out_features)
        for name in group.modules
    )
    for name in group.parameters:
        *experts, rows, columns = tensors[name].shape
        if name in group.gate_up:
            columns *= 2
        count += math.prod(experts) * rank_of(name, lora) * (rows + columns)
    return count


def stored_zeros(model: "PreTrainedModel", targets: LoraTargets, lora: LoraSpec) -> int:
    """The number of zeros that are stored and kept in memory with adapters of gate and up."""
    return sum(
        experts * rows * rank_of(name, lora)
        for name in targets.gate_up
        for experts, rows, _ in (model.get_parameter(name).shape,)
    )
