"""The gated product in the middle of experts, and the gradient that is made in one pass."""

import os
import subprocess
import sys

import pytest
import torch

from job.families.ernie45_vl.packed.swiglu import gated, gated_gradient
from tests.jobs import ROOT

INTERPRETED = """
import torch
from job.families.ernie45_vl.packed.swiglu import _in_one_pass, gated_gradient
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    both, grad = torch.randn(7, 48, dtype=dtype), torch.randn(7, 24, dtype=dtype)
    share = torch.rand(7)
    for found, expected in zip(_in_one_pass(grad, both, share), gated_gradient(grad, both, share)):
        torch.testing.assert_close(found, expected)
"""


def made(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    both = torch.randn(9, 32, dtype=dtype, requires_grad=True)
    share = torch.rand(9, dtype=dtype, requires_grad=True)
    return both, share, torch.randn(9, 16, dtype=dtype)


def test_the_gradient_is_autograd_s() -> None:
    both, share, grad = made(torch.float64)
    expected = torch.autograd.grad(gated(both, share), (both, share), grad)
    found = gated_gradient(grad.float(), both.float(), share.float())
    for own, true in zip(found, expected, strict=True):
        torch.testing.assert_close(own, true.float())


def test_compiled_it_is_the_same() -> None:
    torch._dynamo.reset()
    both, share, grad = made(torch.float32)
    expected = torch.autograd.grad(gated(both, share), (both, share), grad)
    compiled = torch.compile(gated, backend="aot_eager", dynamic=True)(both, share)
    for own, true in zip(torch.autograd.grad(compiled, (both, share), grad), expected, strict=True):
        torch.testing.assert_close(own, true)


def test_the_kernel_s_numbers_are_the_formula_s() -> None:
    pytest.importorskip("triton", reason="torch was built without Triton")
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
