"""How large a job is, from its spec and the model's architecture alone: no weights are read.

What a plan tells, and what a manifest asks a cluster for, come from here.
"""

import math
from dataclasses import dataclass
from typing import Any

from job import families
from job.families import model_source
from job.families.base import LoraTargets, TargetGroup
from job.spec.types import JobSpec, LoraSpec

GIB = 2**30
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
WEIGHTS, OPTIMIZER = 4, 8
"""Bytes that a trained parameter takes in a checkpoint: itself in fp32, and Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Counts of parameters, and bytes."""

    parameters: int
    trainable: int
    download: int
    """The checkpoint that the job starts from, as fetched; 0 where the project ships it."""
    adapter: int
    """What training leaves: the adapter, or all weights where they are trained themselves."""
    checkpoint: int
    """One training checkpoint, with the optimizer's state."""
    merged: int
    """The merged weights; 0 where the spec asks for none."""


def measure(spec: JobSpec) -> Sizes:
    """The sizes of the job.

    Raises InputError where the model's configuration cannot be read, and SpecError where it
    belongs to no known family.
    """
    family, model = families.architecture(spec.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = parameters
    if spec.lora.method == "lora":
        targets = family.lora_targets(model, spec.lora)
        trainable = trained_parameters(model, targets, spec.lora)
    shipped = spec.model.model_name_or_path.startswith(model_source.BUILTIN)
    merged = spec.export.merged
    return Sizes(
        parameters=parameters,
        trainable=trainable,
        download=0 if shipped else parameters * BYTES["bfloat16"],
        adapter=trainable * WEIGHTS,
        checkpoint=trainable * (WEIGHTS + OPTIMIZER),
        merged=parameters * BYTES[merged.dtype] if merged.enabled else 0,
    )


def trained_parameters(model: Any, targets: LoraTargets, lora: LoraSpec) -> int:
    """What an adapter trains: its own matrices, and the model's biases that `lora.bias` names."""
    adapter = sum(adapter_parameters(model, group, lora.r) for group in targets.groups)
    magnitudes = sum(model.get_submodule(n).out_features for n in targets.modules if lora.use_dora)
    return adapter + magnitudes + bias_parameters(model, targets, lora)


def bias_parameters(model: Any, targets: LoraTargets, lora: LoraSpec) -> int:
    """Those of the model that are trained beside an adapter, as PEFT chooses them."""
    if lora.bias == "none":
        return 0
    only = {f"{name}.bias" for name in targets.modules} if lora.bias == "lora_only" else None
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and (only is None or name in only)
    )


def adapter_parameters(model: Any, group: TargetGroup, rank: int) -> int:
    """r · (in + out) for a linear module; the same for each expert of a fused parameter."""
    named = dict(model.named_modules())
    count = sum(rank * (named[n].in_features + named[n].out_features) for n in group.modules)
    tensors = dict(model.named_parameters())
    for name in group.parameters:
        *experts, rows, columns = tensors[name].shape
        count += math.prod(experts) * rank * (rows + columns)
    return count
