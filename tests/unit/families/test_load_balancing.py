"""The routers' auxiliary loss joins the training loss in every way that Transformers has for it."""

import importlib
import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from job.errors import SpecError
from job.families.load_balancing import COEFFICIENTS, PER_CALL, set_aux_loss

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.5,
    "pad_token_id": 0,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}


def _model(kind: str) -> Any:
    """A tiny model of the kind, in training mode."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        text_config={**_TEXT, "rope_parameters": _ROPE},
        vision_config={**_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    )
    return transformers.AutoModelForImageTextToText.from_config(config).train()


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(1, 13).reshape(1, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def test_a_model_that_adds_the_loss_when_it_is_asked_is_asked_in_training() -> None:
    model = _model("qwen3_vl_moe")
    batch = _batch()
    plain = model(**batch)
    assert plain.aux_loss is None
    set_aux_loss(model, None)
    balanced = model(**batch)
    assert float(balanced.loss) == pytest.approx(float(plain.loss) + 0.5 * float(balanced.aux_loss))
    set_aux_loss(model, 0.1)
    assert float(model(**batch).loss) == pytest.approx(
        float(plain.loss) + 0.1 * float(balanced.aux_loss)
    )
    assert model.eval()(**batch).aux_loss is None
    set_aux_loss(model.train(), 0)
    assert float(model(**batch).loss) == pytest.approx(float(plain.loss))
    assert "forward" not in vars(model)


def test_gradients_of_the_loss_reach_adapters_below_the_routers() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        _model("qwen3_vl_moe"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    gradients = []
    for coefficient in (0, 0.5):
        set_aux_loss(model.get_base_model(), coefficient)
        model.zero_grad()
        model(**_batch()).loss.backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    without, with_ = gradients
    assert not torch.allclose(without, with_)


def test_a_weight_of_a_loss_that_no_class_computes_is_refused_and_none_is_not() -> None:
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    for off in (None, 0):
        set_aux_loss(model, off)
    with pytest.raises(SpecError, match="weights a loss that Transformers' LlamaForCausalLM does"):
        set_aux_loss(model, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mapping", ["MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"]
)
def test_every_class_that_computes_the_loss_is_known_by_the_way_it_does(mapping: str) -> None:
    asked, unknown = set(), []
    for kind, names in getattr(modeling_auto, mapping).items():
        for name in names if isinstance(names, tuple | list) else [names]:
            try:
                made = getattr(transformers, name)
            except (AttributeError, ImportError):
                continue
            module = importlib.import_module(made.__module__)
            forward = inspect.getsource(made.forward)
            if not hasattr(module, "load_balancing_loss_func") or "aux_loss" not in forward:
                continue
            held = any(f"self.{name}" in forward for name in COEFFICIENTS)
            if "config.output_router_logits" in forward or "text_config.output_router" in forward:
                unknown += [] if held else [name]
            elif held or 'kwargs.get("output_router_logits"' in forward:
                asked.add(kind)
            else:
                unknown.append(name)
    assert unknown == []
    assert asked <= {*PER_CALL}
    if "IMAGE" in mapping:
        assert asked == {*PER_CALL} - {"jetmoe"}
