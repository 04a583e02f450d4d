"""The backward of SwiGLU as a Triton kernel, one program per row."""

import triton
import triton.language as tl


@triton.jit
def swiglu_backward(
    grad,
    gate_up,
    row_weight,
    gate_up_grad,
    weight_grad,
    width,
    BLOCK: tl.constexpr,  # noqa: N803 - Triton's convention
):
    """Writes `gate_up_grad` (R, 2·width) and `weight_grad` (R,).

    Reads `grad` (R, width), `gate_up` (R, 2·width) and `row_weight` (R,).
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    start = row * 2 * width
    gate = tl.load(gate_up + start + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + start + width + columns, mask=mask, other=0.0).to(tl.float32)
    slope = tl.load(grad + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    activated = gate * sigmoid
    dtype = gate_up_grad.dtype.element_ty
    weight_dtype = weight_grad.dtype.element_ty
    tl.store(weight_grad + row, tl.sum(slope * activated * up, axis=0).to(weight_dtype))
    slope *= tl.load(row_weight + row).to(tl.float32)
    gate_grad = slope * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(gate_up_grad + start + columns, gate_grad.to(dtype), mask=mask)
    tl.store(gate_up_grad + start + width + columns, (slope * activated).to(dtype), mask=mask)
