"""Ends a training that has diverged: weights that are not finite stay so in all further steps."""

from typing import TYPE_CHECKING

from job.distributed import process_group
from job.engines import sharding
from job.errors import SpecError
from job.families.four_bit.tensor import FourBitTensor

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments


def require_finite(
    model: "torch.nn.Module", args: "TrainingArguments", *, step: int, section: str
) -> None:
    """Raises SpecError if any trained weight is not finite after this step.

    If the model that it started from has such weights, it is the cause. `section` is the part of
    the spec that `args` come from. All processes of a group have to call it; each may have shards.
    """
    if not process_group.any_rank(_not_finite(model, trained=True) is not None):
        return
    damaged = process_group.all_gather(_not_finite(model, trained=False))
    if name := next(filter(None, damaged), None):
        raise SpecError(
            "$.model.model_name_or_path",
            f"the model's {name} has values that are not finite, so nothing can be trained",
            fix="download or copy the model again; if it is so at its source, name another one",
        )
    constant = args.lr_scheduler_type == "constant"  # has no warm-up
    raise SpecError(
        f"$.{section}.learning_rate",
        f"the weights are no longer finite after step {step}: the training has diverged",
        value=args.learning_rate,
        fix="lower it" if constant else f"lower it, or raise {section}.warmup_steps",
    )


def _not_finite(model: "torch.nn.Module", *, trained: bool) -> str | None:
    """A trained, or a frozen, weight with a value that is not finite, by its name."""
    import torch

    weights = {
        name: sharding.local_shard(each)
        for name, each in model.named_parameters()
        if each.requires_grad == trained and not isinstance(each, FourBitTensor)
    }
    if not weights:
        return None
    finite = torch.stack([each.isfinite().all() for each in weights.values()]).tolist()
    return next((name for name, good in zip(weights, finite, strict=True) if not good), None)
