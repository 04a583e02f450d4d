"""Ends a training that has diverged: weights that are not finite stay so in all further steps."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from job.distributed import process_group
from job.errors import SpecError

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments


def require_finite(
    weights: "Iterable[torch.Tensor]", args: "TrainingArguments", *, step: int, section: str
) -> None:
    """Raises SpecError if any of the trained weights is not finite after this step.

    `section` is the part of the spec that `args` come from. All processes of a group have to call
    it; each may have shards.
    """
    import torch

    own = [each.to_local() if hasattr(each, "to_local") else each for each in weights]
    finite = torch.stack([each.isfinite().all() for each in own]).all() if own else True
    if not process_group.any_rank(not finite):
        return
    constant = args.lr_scheduler_type == "constant"  # has no warm-up
    raise SpecError(
        f"$.{section}.learning_rate",
        f"the weights are no longer finite after step {step}: the training has diverged",
        value=args.learning_rate,
        fix="lower it" if constant else f"lower it, or raise {section}.warmup_steps",
    )
