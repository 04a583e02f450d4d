"""Attention over packed sequences of unequal length ("varlen"): tokens attend within their own."""

import inspect
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from job.families.autograd import Context

_varlen_attn: Any = varlen_attn
# Torch 2.11 accepts fewer key heads than query heads by default; later versions need an argument.
_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class PackedSequences(NamedTuple):
    """The layout of N packed sequences of T tokens in total, and in a padded grid (N, L)."""

    indices: torch.Tensor
    """(T,): each token's index in the flattened grid, ascending."""
    mask: torch.Tensor
    """(N, L), bool: False where the grid is padding."""
    cu_seqlens: torch.Tensor
    """(N + 1,), int32: where each sequence begins among the T tokens, and the end of the last."""
    varlen: bool = False
    """Whether attention may use the variable-length kernel; see `varlen_trial`."""

    @classmethod
    def of(cls, lengths: list[int], *, longest: int | None = None) -> "PackedSequences":
        """From the sequences' lengths; tensors are on the CPU.

        `longest` widens the grid for sequences up to that length.
        """
        counts = torch.tensor(lengths)
        mask = torch.arange(max(lengths) if longest is None else longest) < counts[:, None]
        cu_seqlens = pad(counts.cumsum(0), (1, 0)).int()
        return cls(indices=mask.flatten().nonzero()[:, 0], mask=mask, cu_seqlens=cu_seqlens)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(T, H, D) to (N, H, L, D), padded with zeros."""
        count, longest = self.mask.shape
        if len(packed) == count * longest:
            grid = packed
        else:
            grid = packed.new_zeros(count * longest, *packed.shape[1:])
            grid.index_copy_(0, self.indices, packed)  # in place, to avoid a copy of the zeros
        return grid.unflatten(0, (count, longest)).transpose(1, 2)

    def unpad(self, grid: torch.Tensor) -> torch.Tensor:
        """(N, H, L, D) to (T, H, D)."""
        flat = grid.transpose(1, 2).flatten(0, 1)
        return flat if len(flat) == len(self.indices) else gather(flat, self.indices)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: PackedSequences,
    *,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Attention within each sequence, (T, H, D); keys and values may have fewer heads (GQA).

    Uses PyTorch's varlen kernel for bf16 or fp16 if `sequences.varlen`, else a padded grid.
    Causal attention needs no mask for right padding; other attention masks it.
    """
    if sequences.varlen and query.dtype in (torch.bfloat16, torch.float16):
        longest = sequences.mask.shape[1]
        # A window as wide as the longest sequence has no effect, except that later torch versions
        # avoid the cuDNN kernel, which rebuilds the plan of its backward pass at every call.
        window = (-1, 0) if causal else (longest, longest)
        return _varlen_attn(
            query,
            key,
            value,
            sequences.cu_seqlens,
            sequences.cu_seqlens,
            longest,
            longest,
            scale=scale,
            window_size=window,
            **(_GQA if query.shape[1] != key.shape[1] else {}),
        )
    q, k, v = (sequences.pad(tensor) for tensor in (query, key, value))  # (N, H, L, D)
    no_padding = len(query) == sequences.mask.numel()
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if causal or no_padding else sequences.mask[:, None, None],  # (N, 1, 1, L)
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return sequences.unpad(out)


def gather(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`values[indices]`, (R, …) to (S, …), for distinct indices.

    The gradient is a copy; that of plain indexing would be a scatter-add, with atomics on a GPU.
    """
    return _Gather.apply(values, indices)


class _GatherContext(Context, Protocol):
    rows: int


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GatherContext, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = len(values)
        return values.index_select(0, indices)

    @staticmethod
    def backward(ctx: _GatherContext, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (indices,) = ctx.saved_tensors
        values_grad = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return values_grad.index_copy_(0, indices, grad), None
