"""The router's split bf16 product equals the fp32 one."""

import copy
from typing import Any

import torch
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.ernie45_vl.packed.router import route, split_bf16


def made() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    config = native.Ernie4_5_VLMoeTextConfig(
        hidden_size=64, moe_num_experts=8, moe_k=2, num_hidden_layers=1
    )
    gate = native.Ernie4_5_VLMoeMoeTopKRouter(config)
    torch.nn.init.normal_(gate.weight, std=0.3)
    torch.nn.init.normal_(gate.moe_statics.e_score_correction_bias, std=0.01)
    return gate.requires_grad_(False), torch.randn(40, 64, dtype=torch.bfloat16)


def test_three_parts_are_the_number() -> None:
    values = torch.randn(1000) * torch.logspace(-6, 6, 1000)
    total = torch.stack([part.double() for part in split_bf16(values)]).sum(0)
    assert torch.equal(total, values.double())


def test_tokens_go_where_the_router_sends_them() -> None:
    gate, tokens = made()
    outcomes = []
    for router in (route, lambda gate, tokens: gate(tokens)):
        own = tokens.clone().requires_grad_()
        logits, weights, chosen = router(gate, own)
        (logits.square().sum() + weights.float().square().sum()).backward()
        outcomes.append((logits, weights, chosen, own.grad))
    (logits, weights, chosen, grad), (*expected, true) = outcomes
    torch.testing.assert_close(logits, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights, expected[1])
    assert torch.equal(chosen, expected[2])
    torch.testing.assert_close(grad, true, rtol=2**-7, atol=1e-3)


def test_a_router_that_is_trained_is_left_alone() -> None:
    gate, tokens = made()
    trained = copy.deepcopy(gate).requires_grad_(True)
    route(trained, tokens)[0].sum().backward()
    assert trained.weight.grad is not None
