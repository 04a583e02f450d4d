"""The router, which selects each token's experts: Transformers' results, but faster on a GPU.

A router multiplies bf16 tokens by fp32 weights, for which GPUs have no fast matrix product. But an
fp32 number is the exact sum of three bf16 numbers, and three fast products accumulated in fp32 are
as accurate as the slow one.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.autograd import Context

if TYPE_CHECKING:
    from peft.tuners.lora import ParamWrapper

PARTS = 3
"""bf16 parts of an fp32 number: fp32 has 24 significant bits, bf16 has 8."""


def route(
    gate: "native.Ernie4_5_VLMoeMoeTopKRouter | ParamWrapper", tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router logits (T, experts), and weights and indices of the k chosen experts, (T, k) each.

    Experts are chosen by probability plus a correction bias ("auxiliary-loss-free" load balancing);
    their weights are the probabilities alone, normalized over the chosen experts.

    If the gate has an adapter, PEFT's wrapper computes it.
    """
    if tokens.dtype != torch.bfloat16 or not _is_frozen(gate):
        return gate(tokens)
    logits = _RouterProduct.apply(tokens, gate.weight)  # (T, experts)
    return logits, *chosen_experts(gate, logits, tokens.dtype)


def chosen_experts(
    gate: "native.Ernie4_5_VLMoeMoeTopKRouter", logits: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in `dtype` and indices of the chosen experts, (T, k) each, of (T, experts)."""
    probabilities = logits.softmax(1)
    top_k_index = gate.moe_statics(probabilities).topk(gate.top_k, dim=-1).indices  # (T, k)
    weights = probabilities.gather(-1, top_k_index)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=gate.norm_min)
    return weights.to(dtype), top_k_index


def router_parts(
    gate: "native.Ernie4_5_VLMoeMoeTopKRouter | ParamWrapper",
) -> torch.Tensor | None:
    """A frozen router's weights for `router_logits`, (H, 3·E); None if it has to compute itself."""
    if not _is_frozen(gate):
        return None
    return torch.cat(split_bf16(gate.weight)).t()


def router_logits(tokens: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """fp32 logits (T, E) of bf16 tokens (T, H) and `router_parts`."""
    largest, middle, least = mm_fp32(tokens, parts).chunk(PARTS, dim=1)
    return largest + (middle + least)


def _is_frozen(
    gate: "native.Ernie4_5_VLMoeMoeTopKRouter | ParamWrapper",
) -> "TypeGuard[native.Ernie4_5_VLMoeMoeTopKRouter]":
    """Whether the gate has no adapter, and its weights are not trained."""
    unwrapped = isinstance(gate, native.Ernie4_5_VLMoeMoeTopKRouter)
    return unwrapped and not gate.weight.requires_grad


class _RouterProduct(torch.autograd.Function):
    """fp32 logits (T, E) of bf16 tokens (T, H) and frozen fp32 weights (E, H)."""

    @staticmethod
    def forward(ctx: Context, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return router_logits(tokens, torch.cat(split_bf16(weight)).t())

    @staticmethod
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        grad_high, grad_low, _ = split_bf16(grad)  # (T, E) each
        weight_high, weight_low, _ = split_bf16(weight)  # (E, H) each
        # The result is rounded to bf16, so products of smaller parts would not matter.
        left = torch.cat([grad_high, grad_high, grad_low], dim=1)  # (T, 3·E)
        right = torch.cat([weight_high, weight_low, weight_high])  # (3·E, H)
        return left @ right, None


def split_bf16(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """bf16 tensors whose sum is the fp32 `values`, largest first."""
    parts = []
    for _ in range(PARTS):
        part = values.bfloat16()
        parts.append(part)
        values = values - part.float()
    return tuple(parts)


@torch.library.custom_op("finetune_job::mm_fp32", mutates_args=())
def mm_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product (T, N) in fp32 of bf16 (T, H) and (H, N), without rounding to bf16."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


@mm_fp32.register_fake
def _(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
