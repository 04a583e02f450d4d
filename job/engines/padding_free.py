"""Whether micro-batches are packed, without padding, as `train.padding_free` asks."""

from job.families.base import Family
from job.spec.types import JobSpec

PACKED_ATTENTION = ("auto", "sdpa")
"""The values of `model.attn_implementation` that a packed step has."""


def why_padded(
    spec: JobSpec, family: Family | type[Family], *, patches_forward: bool
) -> str | None:
    """Why the rows of a micro-batch are padded; None if they are packed.

    `patches_forward` means that the engine has forward passes of its own.
    """
    attention = spec.model.attn_implementation
    reasons = {
        "train.padding_free is false": not spec.train.padding_free,
        f"the family {family.name} has no padding-free step": not family.supports_packing,
        f"model.attn_implementation is {attention}": attention not in PACKED_ATTENTION,
        "the engine has its own forward pass": patches_forward,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
