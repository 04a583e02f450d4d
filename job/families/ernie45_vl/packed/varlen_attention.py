"""Sequences of unequal length, one after another, and attention within each of them."""

import inspect
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

_attend: Any = varlen_attn
# Torch 2.11 takes fewer heads of keys without a word; later ones want to be told.
_FEWER_KEYS = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


class Segments(NamedTuple):
    """Where N packed sequences of T tokens together lie in an (N, L) grid, L the longest."""

    places: torch.Tensor
    """(T,): each token's place in the flattened grid, rising."""
    real: torch.Tensor
    """(N, L): whether a place holds a token."""
    bounds: torch.Tensor
    """(N + 1,), int32: where each sequence begins among the T tokens, and the end of the last."""
    by_bounds: bool = False
    """Whether attention may use the boundaries alone, on a device that `has_kernel`."""

    @classmethod
    def of(cls, lengths: list[int]) -> "Segments":
        """On the host, from the lengths of the N sequences."""
        counts = torch.tensor(lengths)
        real = torch.arange(max(lengths)) < counts[:, None]
        bounds = pad(counts.cumsum(0), (1, 0)).int()
        return cls(places=real.flatten().nonzero()[:, 0], real=real, bounds=bounds)

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

    In bf16 or fp16 on an NVIDIA GPU by one kernel that takes the boundaries. Elsewhere in a grid:
    padding stands behind the tokens of its row, where causal attention never looks; without
    causality it is masked.
    """
    if segments.by_bounds and query.dtype in (torch.bfloat16, torch.float16):
        longest = segments.real.shape[1]
        # A window as wide as all is none. It keeps later versions of torch from cuDNN's kernel,
        # whose plan for the gradient is made anew at every call.
        window = (-1, 0) if causal else (longest, longest)
        return _attend(
            query,
            key,
            value,
            segments.bounds,
            segments.bounds,
            longest,
            longest,
            scale=scale,
            window_size=window,
            **(_FEWER_KEYS if query.shape[1] != key.shape[1] else {}),
        )
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


def has_kernel(device: torch.device) -> bool:
    """Whether the device runs PyTorch's kernel for sequences of unequal length.

    FlashAttention needs Ampere or later; of ROCm it has not been tried.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


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
