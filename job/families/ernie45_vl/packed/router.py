"""Which experts a token takes, as Transformers' router says it, in less time on a GPU.

A router multiplies bf16 tokens by fp32 weights. GPUs have no fast product for that, but an fp32
number is the exact sum of three in bf16, and three fast products added up in fp32 are as exact as
the slow one.
"""

from typing import Any

import torch
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

PARTS = 3
"""bf16 keeps 8 of the 24 binary digits of an fp32 number."""


def route(gate: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (T, experts), and of the chosen experts the weights and numbers, (T, k) each.

    `gate` is an `Ernie4_5_VLMoeMoeTopKRouter`, or what PEFT puts around one whose weights an
    adapter adapts: that computes by itself, as only its own `forward` knows of the adapter.
    """
    own = isinstance(gate, native.Ernie4_5_VLMoeMoeTopKRouter)
    if tokens.dtype != torch.bfloat16 or not own or gate.weight.requires_grad:
        return gate(tokens)
    logits = _Product.apply(tokens, gate.weight)
    shares = logits.softmax(1)
    chosen = gate.moe_statics(shares).topk(gate.top_k, dim=-1).indices
    weights = shares.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=gate.norm_min)
    return logits, weights.to(tokens.dtype), chosen


class _Product(torch.autograd.Function):
    """(T, E) in fp32, of tokens (T, H) in bf16 and frozen weights (E, H) in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        each = product(tokens, torch.cat(in_parts(weight)).t())  # (T, 3·E)
        largest, middle, least = each.chunk(PARTS, dim=1)
        return largest + (middle + least)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        slope, finer, _ = in_parts(grad)
        large, small, _ = in_parts(weight)
        # The gradient is rounded to bf16 at last: smaller products than these are lost anyway.
        left, right = torch.cat([slope, slope, finer], dim=1), torch.cat([large, small, large])
        return left @ right, None


def in_parts(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """bf16 numbers whose sum is `values` in fp32, the largest first."""
    parts = []
    for _ in range(PARTS):
        part = values.bfloat16()
        parts.append(part)
        values = values - part.float()
    return tuple(parts)


@torch.library.custom_op("finetune_job::product", mutates_args=())
def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(T, N) in fp32 from (T, H) and (H, N) in bf16, which is not rounded to bf16 on the way."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


@product.register_fake
def _(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
