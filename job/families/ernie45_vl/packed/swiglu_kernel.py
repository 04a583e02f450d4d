"""The gradient of the gated product, as a kernel in Triton: a program for each row."""

import triton
import triton.language as tl


@triton.jit
def gradient(grad, both, share, by_both, by_share, width, BLOCK: tl.constexpr):  # noqa: N803
    """From rows of `grad` (R, width), `both` (R, 2·width) and `share` (R,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    here = columns < width
    start = row * 2 * width
    gate = tl.load(both + start + columns, mask=here, other=0.0).to(tl.float32)
    up = tl.load(both + start + width + columns, mask=here, other=0.0).to(tl.float32)
    slope = tl.load(grad + row * width + columns, mask=here, other=0.0).to(tl.float32)
    opened = 1 / (1 + tl.exp(-gate))
    active = gate * opened
    kind = by_both.dtype.element_ty
    tl.store(by_share + row, tl.sum(slope * active * up, axis=0).to(by_share.dtype.element_ty))
    slope *= tl.load(share + row).to(tl.float32)
    by_gate = slope * up * opened * (1 + gate * (1 - opened))
    tl.store(by_both + start + columns, by_gate.to(kind), mask=here)
    tl.store(by_both + start + width + columns, (slope * active).to(kind), mask=here)
