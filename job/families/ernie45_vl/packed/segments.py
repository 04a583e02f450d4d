"""Sequences of unequal length, one after another, and attention within each of them."""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention


class Segments(NamedTuple):
    """Where N packed sequences of T tokens together lie in an (N, L) grid, L the longest."""

    places: torch.Tensor
    """(T,): each token's place in the flattened grid, rising."""
    real: torch.Tensor
    """(N, L): whether a place holds a token."""

    @classmethod
    def of(cls, lengths: list[int]) -> "Segments":
        """On the host, from the lengths of the N sequences."""
        longest = max(lengths)
        real = torch.arange(longest) < torch.tensor(lengths)[:, None]
        return cls(places=real.flatten().nonzero()[:, 0], real=real)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(T, H, D) to (N, H, L, D), zeros where no token is."""
        count, longest = self.real.shape
        if len(packed) == count * longest:
            grid = packed
        else:
            grid = packed.new_zeros(count * longest, *packed.shape[1:])
            grid.index_copy_(0, self.places, packed)  # in place: else the room would be copied
        return grid.unflatten(0, (count, longest)).transpose(1, 2)

    def pack(self, grid: torch.Tensor) -> torch.Tensor:
        """(N, H, L, D) to (T, H, D)."""
        flat = grid.transpose(1, 2).flatten(0, 1)
        return flat if len(flat) == len(self.places) else take(flat, self.places)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Attention within each sequence: (T, H, D) from (T, H, D) and keys of as many or fewer heads.

    Padding stands behind the tokens of its row, where causal attention never looks; without
    causality it is masked.
    """
    q, k, v = (segments.pad(tensor) for tensor in (query, key, value))  # (N, H, L, D)
    whole = len(query) == segments.real.numel()
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if causal or whole else segments.real[:, None, None],  # (N, 1, 1, L)
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return segments.pack(out)


def take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`values[places]` of distinct places: (S, …) from (R, …).

    Where each place is taken once its gradient is a copy; that of an index adds, by atomic
    operations on a GPU.
    """
    return _Take.apply(values, places)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(values)
        return values.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        room = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return room.index_copy_(0, places, grad), None
