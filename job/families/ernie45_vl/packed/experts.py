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
from job.families.ernie45_vl.packed.expert_lora import Adapters, adapters_of
from job.families.ernie45_vl.packed.feed_forward import feed_forward
from job.families.ernie45_vl.packed.router import route
from job.families.ernie45_vl.packed.swiglu import gated


class Modalities(NamedTuple):
    """Which of T tokens the experts for text take, and which those for pictures."""

    text: torch.Tensor
    """(T_text,)"""
    vision: torch.Tensor
    """(T_vision,)"""
    places: torch.Tensor
    """(T,): the two one after the other."""
    order: torch.Tensor
    """(T,): where each token is in `places`."""

    @classmethod
    def of(cls, vision: torch.Tensor) -> "Modalities":
        """On the host, from (T,) marks of the tokens for the experts for pictures."""
        text, seen = (~vision).nonzero()[:, 0], vision.nonzero()[:, 0]
        return cls.ordered(text, seen, torch.cat([text, seen]).argsort())

    @classmethod
    def ordered(cls, text: torch.Tensor, vision: torch.Tensor, order: torch.Tensor) -> "Modalities":
        return cls(text=text, vision=vision, places=torch.cat([text, vision]), order=order)


def moe(
    block: Any, hidden: torch.Tensor, modalities: Modalities
) -> tuple[torch.Tensor, torch.Tensor]:
    """An `Ernie4_5_VLMoeMoeBlock` on (T, H): its output (T, H) and router logits (T, experts).

    The logits are those of text, then those of pictures: they are only summed over.
    """
    outputs, logits = [], []
    each = modalities.text, modalities.vision
    parts = permute(hidden, modalities.places, modalities.order).split([len(own) for own in each])
    for sparse, tokens in zip((block.text_moe, block.vision_moe), parts, strict=True):
        if len(tokens):
            routed, weights, chosen = route(sparse.gate, tokens)
            outputs.append(compute_experts(sparse.experts, tokens, chosen, weights))
            logits.append(routed)
    output = permute(torch.cat(outputs), modalities.order, modalities.places)
    if block.shared_experts is not None:
        output = output + feed_forward(block.shared_experts, hidden)
    return output, torch.cat(logits)


def compute_experts(
    experts: Any, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The chosen experts' weighted sum, (T, H), by their own way or, adapted, by this module's."""
    adapters = adapters_of(experts)
    if not adapters:
        return experts(tokens, chosen, weights)
    return sorted_experts(experts.get_base_layer(), tokens, chosen, weights, adapters)


def register() -> None:
    """Makes the implementation known to Transformers."""
    ALL_EXPERTS_FUNCTIONS.register(SORTED_EXPERTS, sorted_experts)


def sorted_experts(
    module: Any,
    tokens: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    adapters: Adapters | None = None,
) -> torch.Tensor:
    """The chosen experts' weighted sum, (T, H), of `tokens` (T, H).

    `chosen` and `weights` are (T, k). A token's weight for an expert is applied in the middle of
    that, where rows are narrowest: what comes out need not be kept for the weight's gradient.
    """
    count, k = chosen.shape
    # Few digits are soon sorted. (T·k,): copy i of token t is at t·k + i
    numbers, order = chosen.flatten().to(torch.int16).sort(stable=True)
    # histc, as bincount waits for the device.
    kind = torch.float if tokens.device.type == "cpu" else torch.int
    load = torch.histc(numbers.to(kind), bins=module.num_experts, max=module.num_experts - 1)
    ends = load.cumsum(0, dtype=torch.int32)
    rows = torch.arange(count * k, device=order.device)
    places = torch.empty_like(order).index_copy_(0, order, rows)  # of copies in their new order

    def project(name: str, copies: torch.Tensor) -> torch.Tensor:
        """(T·k, in) to (T·k, out), each row by its expert's matrix."""
        weight = getattr(module, name)  # (E, out, in)
        out = grouped_mm(copies, weight.transpose(1, 2), offs=ends)
        if adapters is None or name not in adapters:
            return out
        adapter = adapters[name]
        down, up = adapter.in_dtype(weight.dtype)
        inner = grouped_mm(copies, down, offs=ends) * adapter.scaling
        return out + grouped_mm(inner, up, offs=ends)

    copies = _Copies.apply(tokens.to(module.gate_up_proj.dtype), order, places, k)
    share = permute(weights.flatten(), order, places)
    out = project("down_proj", gated(project("gate_up_proj", copies), share))
    return _Sums.apply(out, order, places, k).to(tokens.dtype)


def permute(values: torch.Tensor, places: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`values[places]`, (R, …) from (R, …), where every place is taken once.

    The gradient is taken by the inverse; that of an index would be added up, place by place.
    """
    return _Permute.apply(values, places, inverse)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, places: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return values.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Copies(torch.autograd.Function):
    """(T, H) to (T·k, H): row j is the token of copy `order[j]`. Its gradient is a sum over k."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, places: torch.Tensor, k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.k = k
        return tokens.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return _summed(grad, places, ctx.k), None, None, None


class _Sums(torch.autograd.Function):
    """(T·k, H) to (T, H): the sum of each token's copies. Its gradient is those copies."""

    @staticmethod
    def forward(
        ctx: Any, copies: torch.Tensor, order: torch.Tensor, places: torch.Tensor, k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _summed(copies, places, k)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order // ctx.k), None, None, None


def _summed(copies: torch.Tensor, places: torch.Tensor, k: int) -> torch.Tensor:
    return copies.index_select(0, places).unflatten(0, (-1, k)).sum(1)
