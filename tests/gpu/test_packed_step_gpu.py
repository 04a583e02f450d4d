"""The packed step on a GPU: losses and gradients of the padded step, and no synchronization."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from job import families
from job.engines.compiling import compile_blocks
from job.families.batches import to_device
from job.families.ernie45_vl import Ernie45VL
from job.families.ernie45_vl.packed.batch import pack
from job.families.ernie45_vl.packed.varlen_attention import PackedSequences, attention
from job.spec.load import load_spec
from tests.jobs import ROOT
from tests.unit.families.test_packed_step import BATCHES, adapted, image, row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
CUDA = torch.device("cuda")
TINY = ROOT / "job" / "families" / "builtin" / "ernie-vl-tiny"
MIXED = [
    *BATCHES["mixed images"],
    *(row("x" * (5 + 3 * n), image(60 + 40 * n, 56)) for n in range(12)),
]


@pytest.fixture(scope="module")
def family() -> Ernie45VL:
    spec = load_spec((ROOT / "specs/latex.yaml").read_text(), "latex.yaml", environ={}).spec
    return Ernie45VL.bind(families.read_checkpoint("builtin://ernie-vl-tiny", TINY), spec.data)


@pytest.fixture(scope="module")
def plain(family: Ernie45VL) -> Any:
    model = family.load(dtype=torch.bfloat16, device=CUDA)
    model.set_experts_implementation("eager")
    return model


@pytest.fixture
def sync_debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def step(model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative difference."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("experts", [False, True], ids=["reference targets", "routed experts"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_losses_and_gradients_are_those_of_the_eager_step(
    family: Ernie45VL, plain: Any, experts: bool, compiled: bool
) -> None:
    models = [adapted(plain, packed=packed, experts=experts) for packed in (False, True)]
    if compiled:
        torch._dynamo.reset()
        compile_blocks(models[1])
    encoded = [family.encode(each) for each in MIXED]
    # The error of bf16 itself: the padded step compared with fp32.
    exact = adapted(copy.deepcopy(plain).float(), packed=False, experts=experts)
    exact_loss, exact_grads = step(exact, to_device(family.collate(encoded), CUDA))
    loss, grads = step(models[0], to_device(family.collate(encoded), CUDA))
    packed_loss, packed_grads = step(models[1], to_device(pack(encoded, family.processor), CUDA))
    rounding = abs(float(loss - exact_loss))
    assert abs(float(packed_loss - exact_loss)) <= max(2 * rounding, 2e-2)
    every = [
        torch.cat([found.get(n, torch.zeros_like(g)).flatten() for n, g in exact_grads.items()])
        for found in (grads, packed_grads)
    ]
    true = torch.cat([grad.flatten() for grad in exact_grads.values()])
    assert off(every[1], true) <= max(1.5 * off(every[0], true), 1e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_by_boundaries_is_that_of_the_grid(causal: bool) -> None:
    torch.manual_seed(0)
    lengths = [3, 88, 1, 252, 40]
    made = PackedSequences.of(lengths)
    grid = PackedSequences(made.indices.to(CUDA), made.mask.to(CUDA), made.cu_seqlens.to(CUDA))
    bounded = grid._replace(varlen=True)
    shapes = [(sum(lengths), heads, 64) for heads in (8, 2, 2)]
    tensors = [torch.randn(*shape, device=CUDA, dtype=torch.bfloat16) for shape in shapes]
    outcomes = []
    for sequences in (bounded, grid):
        query, key, value = (tensor.clone().requires_grad_() for tensor in tensors)
        out = attention(query, key, value, sequences, causal=causal, scale=0.125)
        (out.float() ** 2).sum().backward()
        outcomes.append([out.detach(), query.grad, key.grad, value.grad])
    for found, expected in zip(*outcomes, strict=True):
        assert off(found, expected) < 1e-2


@pytest.mark.parametrize("experts", [False, True], ids=["reference targets", "routed experts"])
def test_a_step_never_waits_for_the_device(
    family: Ernie45VL, plain: Any, experts: bool, sync_debug_mode: None
) -> None:
    model = adapted(plain, packed=True, experts=experts)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = to_device(pack([family.encode(each) for each in MIXED], family.processor), CUDA)
    step(model, batch)  # one-time setup may synchronize
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step(model, batch)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
