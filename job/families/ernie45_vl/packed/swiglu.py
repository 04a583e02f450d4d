"""The middle of routed experts: a row's gated numbers times the row's share, and the gradient.

Autograd's own gradient takes three passes over memory: one for either half, and one for the sums
that are the share's. In compiled blocks on a GPU one kernel makes all of it in a single pass.
"""

import functools
from typing import Any

import torch
from torch.nn.functional import silu


def gated(both: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up · share, (R, I), from gate and up side by side (R, 2·I) and shares (R,)."""
    # The kernel is made by the compiler that compiled blocks need anyway.
    if torch.compiler.is_compiling():
        return _Gated.apply(both, share)
    return _product(both, share)


def _product(both: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return silu(gate) * up * share[:, None]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both, share)
        return _product(both, share)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both, share = ctx.saved_tensors
        return gated_gradient(grad, both, share)


@torch.library.custom_op("finetune_job::gated_gradient", mutates_args=())
def gated_gradient(
    grad: torch.Tensor, both: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `both` (R, 2·I) and `share` (R,), from that of the product (R, I)."""
    if both.device.type == "cuda":
        return _in_one_pass(grad.contiguous(), both.contiguous(), share.contiguous())
    gate, up = both.float().chunk(2, dim=-1)
    gate_share = torch.sigmoid(gate)
    active = gate * gate_share
    grad = grad.float()
    by_share = (grad * active * up).sum(-1)
    grad = grad * share.float()[:, None]
    by_gate = grad * up * gate_share * (1 + gate * (1 - gate_share))
    return torch.cat([by_gate, grad * active], dim=-1).to(both.dtype), by_share.to(share.dtype)


@gated_gradient.register_fake
def _(
    grad: torch.Tensor, both: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return both.new_empty(both.shape), share.new_empty(share.shape)


def _in_one_pass(
    grad: torch.Tensor, both: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = grad.shape
    by_both, by_share = torch.empty_like(both), torch.empty_like(share)
    if rows:
        kernel, block = _kernel(), 1 << (width - 1).bit_length()
        kernel[(rows,)](grad, both, share, by_both, by_share, width, BLOCK=block)
    return by_both, by_share


@functools.cache
def _kernel() -> Any:
    """Triton's part, which is there where torch is built for a GPU."""
    from job.families.ernie45_vl.packed import swiglu_kernel

    return swiglu_kernel.gradient
