"""Runs Triton kernels in Triton's interpreter: grouped products against a loop, SwiGLU's gradient.

Started by `test_grouped_products.py` with TRITON_INTERPRET=1, which holds for a whole process.
Prints a line for each case that is off.
"""

import itertools
import sys
from typing import Any

import torch

from job.families.ernie45_vl.packed.swiglu import _backward_by_kernel, swiglu_backward
from job.families.grouped_products import launch
from job.families.grouped_products.kernel_trial import GroupedMm, is_right
from job.families.grouped_products.operators import grouped_product
from job.families.grouped_products.tiles import OuterTiles, Tiles

CPU = torch.device("cpu")
COUNTS = {
    "empty experts, and one row": [0, 37, 0, 0, 1, 18, 0],
    "one expert": [20],
    "whole tiles": [32, 16],
}
SIZES = [(32, 48), (40, 24), (8, 56), (64, 8)]
"""Of weights (in, out): multiples of a tile, neither, and a thin one on either side."""
CASES = [
    *itertools.product(["empty experts, and one row"], SIZES),
    ("one expert", SIZES[1]),
    ("whole tiles", SIZES[0]),
]
TILES = [
    Tiles(rows=16, columns=16, inner=16, warps=4, stages=1, group=2),
    Tiles(rows=32, columns=16, inner=32, warps=4, stages=1, group=1, persistent=1),
    Tiles(rows=16, columns=32, inner=16, warps=4, stages=1, descriptors=True),
    Tiles(rows=32, columns=16, inner=16, warps=4, stages=1, descriptors=True, persistent=2),
]
OUTER = OuterTiles(left=16, right=32, rows=16, warps=4, stages=1)


def check(name: str, found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    assert found is not None
    if found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
        return True
    print(f"{name}: off by {float((found - expected).abs().max())}")
    return False


def products() -> list[bool]:
    right = []
    for name, (inner, width) in CASES:
        counts = COUNTS[name]
        rows, grad = torch.randn(sum(counts), inner), torch.randn(sum(counts), width)
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        parts, grads = rows.split(counts), grad.split(counts)
        case = f"{name}, {inner} by {width}"
        expected = torch.stack([one.T @ other for one, other in zip(parts, grads, strict=True)])
        found = launch.outer(rows, grad, ends, launch.INTERPRETER, OUTER)
        right.append(check(f"outer, {case}", found, expected))
        by_column = torch.randn(len(counts), width, inner).transpose(1, 2)
        for weight in (by_column, by_column.contiguous()):
            expected = torch.cat([one @ w for one, w in zip(parts, weight, strict=True)])
            for tiles in TILES:
                found = launch.product(rows, weight, ends, launch.INTERPRETER, tiles)
                right.append(check(f"{tiles}, {case}", found, expected))
    return right


def gradients() -> list[bool]:
    """Through autograd and the compiler, with the table's tiles, and with a frozen weight."""
    counts = [0, 21, 4]
    rows, grad = torch.randn(25, 24), torch.randn(25, 16)
    weight = torch.randn(3, 16, 24).transpose(1, 2)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    right = []
    ways: tuple[GroupedMm, ...]
    ways = (grouped_product, torch.compile(grouped_product, backend="aot_eager", fullgraph=True))
    for way, trained in itertools.product(ways, (True, False)):
        x, w = rows.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        out = way(x, w, ends)
        node: Any = out.grad_fn
        kept = [saved for saved in node.saved_tensors if saved.shape == rows.shape]
        if way is grouped_product:
            right.append(check("rows kept", torch.tensor(len(kept)), torch.tensor(int(trained))))
        out.backward(grad)
        pairs = list(zip(rows.split(counts), grad.split(counts), weight, strict=True))
        expected = torch.cat([g @ matrix.T for _, g, matrix in pairs])
        right.append(check("gradient of rows", x.grad, expected))
        if trained:
            expected = torch.stack([one.T @ g for one, g, _ in pairs])
            right.append(check("gradient of the weight", w.grad, expected))
    reason = is_right(grouped_product, CPU, torch.float32)
    print(*[reason] * (reason is not None))
    return [*right, reason is None]


def swiglu() -> list[bool]:
    right = []
    for dtype in (torch.float32, torch.bfloat16):
        gate_up, grad = torch.randn(7, 48, dtype=dtype), torch.randn(7, 24, dtype=dtype)
        inputs = grad, gate_up, torch.rand(7)
        pairs = zip(_backward_by_kernel(*inputs), swiglu_backward(*inputs), strict=True)
        for number, (found, expected) in enumerate(pairs):
            try:
                torch.testing.assert_close(found, expected)
            except AssertionError as error:
                print(f"SwiGLU's gradient {number} in {dtype}: {error}")
                right.append(False)
            else:
                right.append(True)
    return right


if __name__ == "__main__":
    torch.manual_seed(0)
    results = []
    for kernels in (products, gradients, swiglu):
        found = kernels()
        results += found
        print(f"{kernels.__name__}: {found.count(True)} right, {found.count(False)} off")
    sys.exit(results.count(False))
