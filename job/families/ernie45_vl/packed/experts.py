"""Routed experts over tokens sorted by expert: one grouped product a projection.

The tokens of the two modalities are told apart by indices that the data workers made; boolean
masks as wide as the hidden states, which Transformers uses, keep three integers an element for
the backward pass.
"""

from typing import Any, NamedTuple

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.moe import _grouped_mm as grouped_mm  # with a way for every dtype

from job.families.base import SORTED_EXPERTS
from job.families.ernie45_vl.packed.segments import take


class Modalities(NamedTuple):
    """Which of T tokens the experts for text take, and which those for pictures."""

    text: torch.Tensor
    """(T_text,)"""
    vision: torch.Tensor
    """(T_vision,)"""
    order: torch.Tensor
    """(T,): where each token is in text and vision one after the other."""

    @classmethod
    def of(cls, vision: torch.Tensor) -> "Modalities":
        """On the host, from (T,) marks of the tokens for the experts for pictures."""
        text, seen = (~vision).nonzero()[:, 0], vision.nonzero()[:, 0]
        return cls(text=text, vision=seen, order=torch.cat([text, seen]).argsort())


def moe(
    block: Any, hidden: torch.Tensor, modalities: Modalities
) -> tuple[torch.Tensor, torch.Tensor]:
    """An `Ernie4_5_VLMoeMoeBlock` on (T, H): its output (T, H) and router logits (T, experts)."""
    outputs, logits = [], []
    for sparse, places in (
        (block.text_moe, modalities.text),
        (block.vision_moe, modalities.vision),
    ):
        if len(places):
            tokens = take(hidden, places)
            routed, weights, chosen = sparse.gate(tokens)
            outputs.append(sparse.experts(tokens, chosen, weights))
            logits.append(routed)
    output = take(torch.cat(outputs), modalities.order)
    if block.shared_experts is not None:
        output = output + block.shared_experts(hidden)
    return output, take(torch.cat(logits), modalities.order)


def register() -> None:
    """Makes the implementation known to Transformers."""
    ALL_EXPERTS_FUNCTIONS.register(SORTED_EXPERTS, sorted_experts)


def sorted_experts(
    module: Any, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The chosen experts' weighted sum, (T, H), of `tokens` (T, H).

    `chosen` and `weights` are (T, k). Gathering the k copies of a token has a sum over k as its
    gradient, not an atomic addition.
    """
    count, k = chosen.shape
    by_expert, order = chosen.flatten().sort()  # (T·k,): copy i of token t is at t·k + i
    # histc, as bincount waits for the device.
    kind = torch.float if tokens.device.type == "cpu" else torch.int
    load = torch.histc(by_expert.to(kind), bins=module.num_experts, max=module.num_experts - 1)
    ends = load.cumsum(0, dtype=torch.int32)

    gate_up, down = module.gate_up_proj, module.down_proj  # (E, 2·I, H), (E, H, I)
    copies = _Copies.apply(tokens.to(gate_up.dtype), order, k)
    gate, up = grouped_mm(copies, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = grouped_mm(module.act_fn(gate) * up, down.transpose(1, 2), offs=ends)  # (T·k, H)
    out = out * take(weights.flatten(), order)[:, None]
    room = torch.empty_like(out).index_copy_(0, order, out)  # which fills all of it
    return room.view(count, k, -1).sum(1).to(tokens.dtype)


class _Copies(torch.autograd.Function):
    """(T, H) to (T·k, H): row j is the token of copy `order[j]`."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return tokens.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order,) = ctx.saved_tensors
        room = torch.empty_like(grad).index_copy_(0, order, grad)
        return room.view(-1, ctx.k, grad.shape[-1]).sum(1), None, None
