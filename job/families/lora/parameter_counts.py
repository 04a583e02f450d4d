"""Counts the weights that LoRA trains in a model, from its architecture alone."""

import math
from typing import TYPE_CHECKING

from job.families.lora.patterns import rank_of
from job.families.lora.selection import trained_in_full
from job.families.lora.target_groups import LoraTargets, TargetGroup
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
