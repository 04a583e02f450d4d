"""SwiGLU inside routed experts, and its gradient in a single pass.

The kernel runs in `test_grouped_products.py`, with the others.
"""

import torch

from job.families.ernie45_vl.packed.swiglu import swiglu, swiglu_backward


def made(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    gate_up = torch.randn(9, 32, dtype=dtype, requires_grad=True)
    row_weight = torch.rand(9, dtype=dtype, requires_grad=True)
    return gate_up, row_weight, torch.randn(9, 16, dtype=dtype)


def test_the_gradient_is_autograd_s() -> None:
    gate_up, row_weight, grad = made(torch.float64)
    expected = torch.autograd.grad(swiglu(gate_up, row_weight), (gate_up, row_weight), grad)
    found = swiglu_backward(grad.float(), gate_up.float(), row_weight.float())
    for own, true in zip(found, expected, strict=True):
        torch.testing.assert_close(own, true.float())


def test_compiled_it_is_the_same() -> None:
    torch._dynamo.reset()
    gate_up, row_weight, grad = made(torch.float32)
    expected = torch.autograd.grad(swiglu(gate_up, row_weight), (gate_up, row_weight), grad)
    compiled = torch.compile(swiglu, backend="aot_eager", dynamic=True)(gate_up, row_weight)
    for own, true in zip(
        torch.autograd.grad(compiled, (gate_up, row_weight), grad), expected, strict=True
    ):
        torch.testing.assert_close(own, true)
