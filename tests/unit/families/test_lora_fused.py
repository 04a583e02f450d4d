"""Layers fused with their adapters: PEFT's values and gradients, and the weights come back."""

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from job.engines.compiling import compile_blocks
from job.engines.fused_lora import fuse_adapters
from job.families.lora.fused import ALIGNMENT, FusedLoraLinear
from job.families.lora.linear import (
    LoraLinear,
    linear_in_parts,
    linear_together,
    use_lora_linear,
)

ALL = ["q", "k", "v", "qkv", "o", "fc"]


class Block(nn.Module):
    """Three layers that read the same, one in parts, one whose input is kept, and one by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, width, bias=False) for width in (16, 8, 8))
        self.qkv, self.o, self.fc = nn.Linear(32, 24), nn.Linear(8, 20), nn.Linear(20, 12)

    def layers_computed_together(self) -> list[tuple[nn.Module, ...]]:
        return [(self.q, self.k, self.v)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = linear_together((self.q, self.k, self.v), x)
        first, second, third = linear_in_parts(
            self.qkv, torch.cat([q.sin(), k.cos(), v], dim=-1), 3
        )
        [out] = linear_together((self.o,), first.tanh() * second + third, input_saved=True)
        result: torch.Tensor = x + self.fc(out.sin())
        return result


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(
    targets: list[str] = ALL, dtype: torch.dtype = torch.float32, r: int = 4, **settings: Any
) -> Any:
    torch.manual_seed(0)
    model = Model().to(dtype).requires_grad_(False)
    config = LoraConfig(
        r=r, lora_alpha=2, target_modules=targets, init_lora_weights=False, **settings
    )
    return get_peft_model(model, config)


def pair(*args: Any, **settings: Any) -> tuple[Any, Any]:
    """PEFT's own model, and the same laid and compiled."""
    peft = adapted(*args, **settings)
    own = copy.deepcopy(peft)
    use_lora_linear(own)
    blocks = list(own.base_model.model.blocks)
    own.fused_lora = fuse_adapters(own, blocks)
    for block in blocks:
        block.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    return peft, own


def outcome(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    given = x.clone().requires_grad_()
    out = model(given)
    out.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads
    return [out.detach(), given.grad, *grads]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def same(models: tuple[Any, Any], x: torch.Tensor) -> None:
    """In fp32 they are equal; in bf16 the second is as near to fp32 as the first is."""
    theirs, own = (outcome(model, x) for model in models)
    assert [(t.dtype, t.shape) for t in own] == [(t.dtype, t.shape) for t in theirs]
    if x.dtype == torch.float32:
        for found, expected in zip(own, theirs, strict=True):
            assert off(found, expected) < 1e-4
        return
    exact = outcome(copy.deepcopy(models[0]).float(), x.float())
    true, near, found = (
        torch.cat([t.float().flatten() for t in each]) for each in (exact, theirs, own)
    )
    assert off(found, true) <= 1.5 * off(near, true)


def laid(model: Any) -> list[int]:
    """How many layers each matrix holds."""
    return [len(layers) for _, layers in model.fused_lora.groups] if model.fused_lora else []


@pytest.mark.parametrize(
    ("dtype", "r", "shape"),
    [
        pytest.param(torch.float32, 3, (5,), id="packed-fp32"),
        pytest.param(torch.bfloat16, 8, (2, 3), id="padded-bf16"),
        pytest.param(torch.bfloat16, 3, (5,), id="packed-bf16", marks=pytest.mark.slow),
        pytest.param(torch.float32, 8, (2, 3), id="padded-fp32", marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_peft(
    dtype: torch.dtype, r: int, shape: tuple[int, ...]
) -> None:
    models = pair(dtype=dtype, r=r)
    assert laid(models[1]) == 2 * [3, 1, 1, 1]
    for rows in (1, 4):
        same(models, torch.randn(rows, *shape, 12, dtype=dtype).squeeze(0))


@pytest.mark.parametrize(
    ("targets", "matrices"),
    [(["q", "v", "o"], [1, 1, 1]), (["k", "fc"], [1, 1]), (["qkv"], [1]), (["o"], [1])],
    ids=str,
)
def test_what_is_adapted_alone_is_laid_alone(targets: list[str], matrices: list[int]) -> None:
    models = pair(targets)
    assert laid(models[1]) == 2 * matrices
    same(models, torch.randn(7, 12))


def test_each_pass_computes_with_the_adapter_as_it_is_then() -> None:
    models = pair()
    x = torch.randn(5, 12)
    same(models, x)
    for model in models:
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    same(models, x)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str
)
def test_what_does_more_than_two_matrices_is_not_laid(settings: dict[str, Any]) -> None:
    _, own = pair(["qkv", "o", "fc"], **settings)
    assert laid(own) == []


def test_another_adapter_is_computed_by_its_own_matrices() -> None:
    models = pair()
    x = torch.randn(5, 12)
    same(models, x)
    for model in models:
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q", "fc"], init_lora_weights=False)
        model.add_adapter("other", config)
        model.set_adapter("other")
    same(models, x)


def test_released_blocks_have_weights_of_their_own_under_the_names_they_had() -> None:
    model = adapted()
    use_lora_linear(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(5, 12)
    expected = model(x)
    fused_lora = fuse_adapters(model, list(model.base_model.model.blocks))
    assert fused_lora is not None
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert not any(layer.get_base_layer().weight.is_contiguous() for layer in layers)
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    fused_lora.release()
    assert not any(layer.fused for layer in layers)
    for name, tensor in model.state_dict().items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, before[name])
    torch.testing.assert_close(model(x), expected)
    assert not model._forward_pre_hooks


def test_released_matrices_are_freed_while_their_holder_lives() -> None:
    _, own = pair()
    own(torch.randn(5, 12)).sum().backward()
    matrices = [weakref.ref(fused.matrix) for fused, _ in own.fused_lora.groups]
    assert matrices
    own.fused_lora.release()
    assert not any(matrix() is not None for matrix in matrices)
    own.fused_lora.release()  # a second time, at the end of training, changes nothing


def test_blocks_are_compiled_with_weights_where_they_are_if_that_is_asked_for() -> None:
    model = adapted()
    use_lora_linear(model)
    compile_blocks(model, fuse=False)
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert all(layer.get_base_layer().weight.is_contiguous() for layer in layers)


def test_ranks_are_filled_up_with_zeros_to_what_fast_products_take() -> None:
    weights = [torch.randn(6, 10), torch.randn(4, 10)]
    fused = FusedLoraLinear.of(weights, None, [3, 3], "default")
    assert fused.matrix.shape == (10 + ALIGNMENT, 10 + ALIGNMENT)
    for own, weight in zip(fused.weights(), weights, strict=True):
        assert torch.equal(own, weight)
    for down, up in fused.adapters():
        down.fill_(1)
        up.fill_(1)
    assert int(fused.matrix[10:].sum()) == 2 * 3 * 10
    assert int(fused.matrix[:, 10:].sum()) == 3 * 6 + 3 * 4
