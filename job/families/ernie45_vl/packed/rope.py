"""RoPE as two products and a sum; the gradient is the inverse rotation.

Transformers concatenates rotated halves, which compiles to a kernel that branches for every element
on its half; the gradient splits and adds them again.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from job.families.autograd import Context

SwapPairs = Callable[[torch.Tensor], torch.Tensor]
"""Exchanges the two elements of each rotated pair, in the last dimension."""


class RotaryAngles(NamedTuple):
    """The rotation of each of T tokens, for heads of size D."""

    cos: torch.Tensor
    """(T, D): equal for both elements of a pair."""
    sin: torch.Tensor
    """(T, D): negative for the first element of a pair, positive for the second."""

    @classmethod
    def of(cls, cos: torch.Tensor, sin: torch.Tensor, swap: SwapPairs) -> "RotaryAngles":
        """From the output of the model's rotary embedding, (T, D) each."""
        index = torch.arange(sin.shape[-1], device=sin.device)  # (D,)
        return cls(cos=cos, sin=torch.where(swap(index) > index, -sin, sin))


def swap_halves(values: torch.Tensor) -> torch.Tensor:
    """(…, D): element n of the first half pairs with element n of the second (vision tower)."""
    if _copies_faster(values):
        first, second = values.chunk(2, dim=-1)
        return torch.cat((second, first), dim=-1)
    return values.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


def swap_neighbors(values: torch.Tensor) -> torch.Tensor:
    """(…, D): elements 2n and 2n + 1 pair, "interleaved" RoPE (language model)."""
    if _copies_faster(values):
        return torch.stack((values[..., 1::2], values[..., 0::2]), dim=-1).flatten(-2)
    return values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _copies_faster(values: torch.Tensor) -> bool:
    """Whether copies take a half to a quarter of `flip`'s time: its kernel for CPUs is slow."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def apply_rope(values: torch.Tensor, angles: RotaryAngles, swap: SwapPairs) -> torch.Tensor:
    """Rotates queries or keys (T, heads, D); computes in fp32, like Transformers."""
    rotated: torch.Tensor = _Rotation.apply(values, angles.cos, angles.sin, swap)
    return rotated


class _RotationContext(Context, Protocol):
    swap: SwapPairs


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _RotationContext,
        values: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        swap: SwapPairs,
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.swap = swap
        return _rotate(values, cos, sin, swap)

    @staticmethod
    def backward(
        ctx: _RotationContext, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, ctx.swap), None, None, None


def _rotate(
    values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, swap: SwapPairs
) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()  # (T, 1, D)
    return (values.float() * cos + swap(values).float() * sin).to(values.dtype)
