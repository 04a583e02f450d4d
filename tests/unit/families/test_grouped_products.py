"""Grouped products by Triton kernels: equal to a loop, and chosen only where they work."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from job.families.grouped_products.choice import WAYS, choose, grouped_mm
from job.families.grouped_products.kernel_trial import is_right, loop
from tests.jobs import ROOT

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="this build of torch comes without Triton"
)


@needs_triton
def test_kernels_and_their_gradients_equal_a_loop_in_tritons_interpreter() -> None:
    """SwiGLU's too: importing everything once more would take longer than it does."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.unit.families.grouped_interpreted"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    right = dict(re.findall(r"^(\w+): (\d+) right, 0 off$", ended.stdout, re.MULTILINE))
    assert {kernels: int(count) > 0 for kernels, count in right.items()} == {
        "products": True,
        "gradients": True,
        "swiglu": True,
    }


def test_a_cpu_keeps_the_loop_of_transformers() -> None:
    assert choose(CPU, torch.bfloat16).way == "loop"


def test_the_chosen_product_equals_a_loop_also_compiled() -> None:
    assert is_right(grouped_mm, CPU, torch.float32) is None
    # Not in fp32, where Transformers' loop has a backward that cannot be compiled.
    compiled = torch.compile(grouped_mm, backend="aot_eager", fullgraph=True)
    assert is_right(compiled, CPU, torch.bfloat16) is None


def test_a_way_that_is_wrong_or_fails_is_not_taken() -> None:
    def doubled(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return 1.01 * loop(rows, weight, ends)

    def failing(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C compiler\nand more")

    def infinite(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return loop(rows, weight, ends) * float("inf")

    assert "is off by 1.0e-02" in str(is_right(doubled, CPU, torch.float32))
    assert "is off by" in str(is_right(infinite, CPU, torch.float32))
    assert is_right(failing, CPU, torch.float32) == "no C compiler"
    assert is_right(WAYS["loop"], CPU, torch.float32) is None
