"""Computes the sizes of a job from its spec and the model's architecture, without weights."""

from dataclasses import dataclass

from job import families
from job.families import model_source
from job.families.lora.parameter_counts import stored_zeros, trained_parameters
from job.spec.types import JobSpec

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
