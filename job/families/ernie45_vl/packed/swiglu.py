"""SwiGLU of routed experts, with each row scaled by its routing weight.

Autograd's backward reads memory three times: for each half, and for the sum that is the gradient of
the routing weight. In compiled blocks on a GPU, one kernel reads it once.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import silu

from job.families.autograd import Context

if TYPE_CHECKING:
    from triton.runtime import JITFunction


def swiglu(gate_up: torch.Tensor, row_weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up · row_weight, (R, I), of gate and up side by side (R, 2·I) and (R,)."""
    # Only in compiled blocks, because the Triton kernel needs a compiler too.
    if torch.compiler.is_compiling():
        return _SwiGlu.apply(gate_up, row_weight)
    return _forward(gate_up, row_weight)


def _forward(gate_up: torch.Tensor, row_weight: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up * row_weight[:, None]


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate_up: torch.Tensor, row_weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up, row_weight)
        return _forward(gate_up, row_weight)

    @staticmethod
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, row_weight = ctx.saved_tensors
        return swiglu_backward(grad, gate_up, row_weight)


@torch.library.custom_op("finetune_job::swiglu_backward", mutates_args=())
def swiglu_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, row_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `gate_up` (R, 2·I) and `row_weight` (R,), from the output's (R, I)."""
    if gate_up.device.type == "cuda":
        return _backward_by_kernel(grad.contiguous(), gate_up.contiguous(), row_weight.contiguous())
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    grad = grad.float()
    weight_grad = (grad * activated * up).sum(-1)
    grad = grad * row_weight.float()[:, None]
    gate_grad = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    gate_up_grad = torch.cat([gate_grad, grad * activated], dim=-1)
    return gate_up_grad.to(gate_up.dtype), weight_grad.to(row_weight.dtype)


@swiglu_backward.register_fake
def _(
    grad: torch.Tensor, gate_up: torch.Tensor, row_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate_up.new_empty(gate_up.shape), row_weight.new_empty(row_weight.shape)


def _backward_by_kernel(
    grad: torch.Tensor, gate_up: torch.Tensor, row_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = grad.shape
    gate_up_grad, weight_grad = torch.empty_like(gate_up), torch.empty_like(row_weight)
    if rows:
        kernel, block = _kernel(), 1 << (width - 1).bit_length()
        kernel[(rows,)](grad, gate_up, row_weight, gate_up_grad, weight_grad, width, BLOCK=block)
    return gate_up_grad, weight_grad


@functools.cache
def _kernel() -> "JITFunction":
    """Imported on first use: Triton is only installed with GPU builds of torch."""
    from job.families.ernie45_vl.packed import swiglu_kernel

    return swiglu_kernel.swiglu_backward
