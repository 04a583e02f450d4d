"""Gradients that come in parts, side by side in one tensor.

The compiler would have one kernel write all parts, which asks of every number which of them it
belongs to. Where something stands beside them that is in memory already, it has whatever makes a
part write it to its place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

ALIGNED = 8
"""Rows of whole 16 bytes, eight numbers in bf16, are what the fast products take."""


def joined(parts: Sequence[torch.Tensor], room: torch.Tensor) -> torch.Tensor:
    """The parts side by side, (T, n), and behind them as many numbers of no meaning as `room` has,
    (T, r).
    """
    # Running sums are what the compiler puts into memory at once.
    return torch.cat([*parts, room.cumsum(1)], dim=1)


def frozen_in_parts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int
) -> list[torch.Tensor]:
    """What a frozen linear layer makes of x (…, in), in equal parts, (…, out / count) each."""
    made: Sequence[torch.Tensor] = _InParts.apply(x.flatten(0, -2), weight, bias, count)
    return [each.unflatten(0, x.shape[:-1]) for each in made]


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias).chunk(count, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        whole = joined(grads, grads[-1][:, :ALIGNED])
        return whole[:, : len(weight)] @ weight, None, None, None
