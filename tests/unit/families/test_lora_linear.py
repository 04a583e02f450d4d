"""LoRA in the dtype of its base: PEFT's values and gradients; other variants stay PEFT's."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from job.families.lora.linear import LoraLinear, use_lora_linear


def adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 6, bias=False)).to(dtype)
    config = LoraConfig(
        **{"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False, **settings}
    )
    return get_peft_model(model, config)


def outcome(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of all that is trained."""
    given = x.clone().requires_grad_()
    out = model(given)
    out.float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    return [out.detach(), given.grad, *(p.grad for p in trained)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("compiled", [False, True], ids=["as written", "compiled"])
def test_values_and_gradients_are_those_of_peft(
    dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    peft, own = adapted(dtype), adapted(dtype)
    assert use_lora_linear(own) == 2
    if compiled:
        torch._dynamo.reset()
        own.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    x = torch.randn(5, 12, dtype=dtype)
    for found, expected in zip(outcome(own, x), outcome(peft, x), strict=True):
        assert found.dtype == expected.dtype
        off = (found.float() - expected.float()).norm() / expected.float().norm()
        assert float(off) < tolerance
    trained = {p.dtype for p in own.parameters() if p.requires_grad}
    assert trained == {torch.float32}, "what is trained stays fp32"


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=str
)
def test_what_does_more_stays_peft_s(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    assert use_lora_linear(model) == 0
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_without_its_adapter_and_with_another_it_does_what_peft_does() -> None:
    peft, own = adapted(), adapted()
    use_lora_linear(own)
    x = torch.randn(5, 12)
    with own.disable_adapter(), peft.disable_adapter():
        torch.testing.assert_close(own(x), peft(x))
    for model in (peft, own):
        torch.manual_seed(1)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        model.set_adapter("other")
    torch.testing.assert_close(own(x), peft(x))
    for model in (peft, own):
        model.delete_adapter("other")
        model.set_adapter("default")
    torch.testing.assert_close(own(x), peft(x))
    merged = own.merge_and_unload()
    torch.testing.assert_close(merged(x), peft(x))
