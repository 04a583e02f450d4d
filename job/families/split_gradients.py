"""Writes split gradients into one buffer, avoiding Inductor's concatenation kernel.

That kernel branches for every element on the part it belongs to. If the concatenation ends with a
tensor that is already materialized, each part's own kernel writes into the buffer instead.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from job.families.autograd import Context

ALIGNMENT = 8
"""Fast matrix products need rows that are multiples of 16 bytes: eight elements in bf16."""


def concat_gradients(parts: Sequence[torch.Tensor], spare: torch.Tensor) -> torch.Tensor:
    """Concatenates the parts (T, n), followed by as many columns as `spare` (T, r) has.

    The contents of the spare columns are arbitrary; callers overwrite or ignore them.
    """
    # The compiler always materializes a cumulative sum.
    return torch.cat([*parts, spare.cumsum(1)], dim=1)


def split_frozen_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int
) -> list[torch.Tensor]:
    """The output of a frozen linear layer for x (…, in), in equal parts (…, out / count)."""
    parts: Sequence[torch.Tensor] = _SplitLinear.apply(x.flatten(0, -2), weight, bias, count)
    return [part.unflatten(0, x.shape[:-1]) for part in parts]


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias).chunk(count, dim=1)

    @staticmethod
    def backward(ctx: Context, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors  # (out, in)
        grad = concat_gradients(grads, grads[-1][:, :ALIGNMENT])  # (T, out + ALIGNMENT)
        return grad[:, : len(weight)] @ weight, None, None, None
