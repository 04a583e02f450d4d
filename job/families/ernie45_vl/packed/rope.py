"""Rotary embeddings by two products and a sum, whose gradient is the rotation back.

Transformers puts a head together from two halves, of which a compiler makes a kernel that asks of
every number which half it is in; and its gradient takes the halves apart and adds them up again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Swap = Callable[[torch.Tensor], torch.Tensor]
"""Changes the two numbers of each pair of the last dimension."""


class Angles(NamedTuple):
    """By how much the pairs of each of T tokens are turned."""

    cos: torch.Tensor
    """(T, D), the same for both of a pair."""
    sin: torch.Tensor
    """(T, D), the same for both but for the sign: negative for the first."""

    @classmethod
    def of(cls, cos: torch.Tensor, sin: torch.Tensor, swap: Swap) -> "Angles":
        """From what a model's own rotary embedding gives, (T, D) each."""
        places = torch.arange(sin.shape[-1], device=sin.device)
        return cls(cos=cos, sin=torch.where(swap(places) > places, -sin, sin))


def halves(values: torch.Tensor) -> torch.Tensor:
    """(…, D), where number n of the first half and number n of the second are a pair."""
    return values.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """(…, D), where each number at an even place and the one behind it are a pair."""
    return values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def rotated(values: torch.Tensor, angles: Angles, swap: Swap) -> torch.Tensor:
    """(T, heads, D) turned by each token's angles, computed in fp32 as Transformers does."""
    turned: torch.Tensor = _Rotation.apply(values, angles.cos, angles.sin, swap)
    return turned


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, swap: Swap
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.swap = swap
        return _turn(values, cos, sin, swap)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.swap), None, None, None


def _turn(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, swap: Swap) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    return (values.float() * cos + swap(values).float() * sin).to(values.dtype)
