"""The Triton kernels as operators that autograd and the compiler know.

Custom operators, so that the compiler takes them as they are, and a block's graph has no break.
"""

from typing import Protocol

import torch

from job.families.autograd import Context


@torch.library.custom_op("finetune_job::grouped_product", mutates_args=())
def grouped_product(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(M, in) by (E, in, out) to (M, out): each row by the matrix of its expert.

    Rows are sorted by expert, and expert e's end at `ends[e]`, (E,) int32; every row belongs to an
    expert. Sums are in fp32, of fp32 inputs without TF32. Never waits for the device.
    """
    from job.families.grouped_products import launch

    with launch.current(rows.device):
        return launch.product(rows, weight, ends, launch.device_of(rows.device))


@grouped_product.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.custom_op("finetune_job::grouped_outer", mutates_args=())
def grouped_outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(M, in) and (M, out) to (E, in, out): each expert's transposed rows by its other rows.

    The gradient of the weight of `grouped_product`. Zeros for an expert without rows.
    """
    from job.families.grouped_products import launch

    with launch.current(left.device):
        return launch.outer(left, right, ends, launch.device_of(left.device))


@grouped_outer.register_fake
def _(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


class _ProductContext(Context, Protocol):
    needs_input_grad: tuple[bool, ...]
    by_column: bool


def _save(
    ctx: _ProductContext,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    output: torch.Tensor,
) -> None:
    rows, weight, ends = inputs
    # Rows are as large as the activations of the whole layer, and needed only for this gradient.
    kept = (rows,) if weight.requires_grad else ()
    ctx.save_for_backward(weight, ends, *kept)
    ctx.by_column = weight.stride(1) == 1


def _backward(
    ctx: _ProductContext, grad: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    weight, ends, *kept = ctx.saved_tensors
    rows_grad = weight_grad = None
    if ctx.needs_input_grad[0]:
        rows_grad = grouped_product(grad, weight.transpose(1, 2), ends)
    if ctx.needs_input_grad[1]:
        # In the weight's own memory layout, so that no copy is made of it.
        if ctx.by_column:
            weight_grad = grouped_outer(grad, kept[0], ends).transpose(1, 2)
        else:
            weight_grad = grouped_outer(kept[0], grad, ends)
    return rows_grad, weight_grad, None


grouped_product.register_autograd(_backward, setup_context=_save)
