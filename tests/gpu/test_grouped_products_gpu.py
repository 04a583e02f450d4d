"""Grouped products by the Triton kernels on a GPU: exact, captured, compiled, and never waiting."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from job.families.grouped_products.choice import WAYS, choose
from job.families.grouped_products.kernel_trial import is_right, loop, waits_for_nothing
from job.families.grouped_products.operators import grouped_outer, grouped_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
CUDA = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(256, 512), (200, 136), (512, 8), (8, 256)]
LOADS = {
    "few rows": [0, 1, 7, 0, 16, 3, 0, 5],
    "some rows": [0, 60, 33, 1, 90, 0, 128, 40],
    "many rows": [1000, 0, 129, 700, 1, 256, 0, 511],
}


def example(
    load: str, inner: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    counts = torch.tensor(LOADS[load])
    rows = torch.randn(int(counts.sum()), inner, device=CUDA).to(dtype)
    weight = torch.randn(len(counts), width, inner, device=CUDA).to(dtype).transpose(1, 2)
    return rows, weight, counts.cumsum(0).to(CUDA, torch.int32)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative difference."""
    return float((found.double() - expected).norm() / expected.norm())


def tolerance(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "width"), SIZES)
@pytest.mark.parametrize("load", LOADS)
def test_products_and_sums_of_outer_products_equal_a_loop(
    load: str, inner: int, width: int, dtype: torch.dtype
) -> None:
    rows, weight, ends = example(load, inner, width, dtype)
    exact = loop(rows.double(), weight.double(), ends)
    for matrix in (weight, weight.contiguous()):
        assert off(grouped_product(rows, matrix, ends), exact) <= tolerance(dtype)
    grad = torch.randn(len(rows), width, device=CUDA).to(dtype)
    bounds = [0, *ends.tolist()]
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    sums = torch.stack([rows[part].double().T @ grad[part].double() for part in parts])
    assert off(grouped_outer(rows, grad, ends), sums) <= tolerance(dtype)


@pytest.mark.parametrize("load", LOADS)
def test_bf16_products_equal_torchs_own(load: str) -> None:
    rows, weight, ends = example(load, 256, 512, torch.bfloat16)
    expected = WAYS["torch"](rows, weight, ends)
    torch.testing.assert_close(grouped_product(rows, weight, ends), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_products_and_gradients_are_right_and_never_wait(
    dtype: torch.dtype, compiled: bool
) -> None:
    torch._dynamo.reset()
    way = torch.compile(grouped_product, fullgraph=True) if compiled else grouped_product
    assert is_right(way, CUDA, dtype) is None
    assert waits_for_nothing(way, CUDA, dtype) is None


@pytest.fixture
def captured() -> Iterator[torch.cuda.CUDAGraph]:
    graph = torch.cuda.CUDAGraph()
    yield graph
    graph.reset()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_product_follows_new_rows_and_new_loads(
    dtype: torch.dtype, captured: torch.cuda.CUDAGraph
) -> None:
    rows, weight, ends = example("many rows", 256, 512, dtype)
    rows.requires_grad_()
    weight.requires_grad_()

    def work() -> list[torch.Tensor]:
        out = grouped_product(rows, weight, ends)
        return [out, *torch.autograd.grad(out, (rows, weight), out.detach())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(captured):
        found = work()
    with torch.no_grad():
        rows.copy_(torch.randn_like(rows))
        ends.copy_(torch.tensor([5, 5, 900, 901, 901, 2000, 2596, 2597]))
    captured.replay()
    with torch.no_grad():
        again = [tensor.clone() for tensor in found]
    for one, other in zip(again, work(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    exact = loop(rows.detach().double(), weight.detach().double(), ends)
    assert off(again[0].detach(), exact) <= tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_chosen_here_never_waits(dtype: torch.dtype) -> None:
    choice = choose(CUDA, dtype)
    assert choice.way in {"torch", "triton"}, choice
    if torch.cuda.get_device_capability() in {(9, 0), (10, 0)} and dtype == torch.bfloat16:
        assert choice.way == "torch"  # one kernel there
    assert waits_for_nothing(WAYS[choice.way], CUDA, dtype) is None
