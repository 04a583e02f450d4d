"""The mixture-of-experts block: tokens sorted by expert, one grouped product per projection.

ERNIE-4.5-VL has two sets of routed experts with a router each ("modality-isolated routing"): one
for text tokens, and one for image tokens and image start and end tokens. Shared experts process all
tokens. The data workers compute the indices of each modality's tokens. Transformers uses boolean
masks as wide as the hidden states, which save three integers per element for the backward pass.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from job.families.autograd import Context
from job.families.base import SORTED_EXPERTS
from job.families.ernie45_vl.packed.expert_lora import CastLora, ExpertLora, expert_loras
from job.families.ernie45_vl.packed.feed_forward import feed_forward
from job.families.ernie45_vl.packed.router import route
from job.families.ernie45_vl.packed.swiglu import swiglu
from job.families.four_bit.tensor import frozen_grouped_mm
from job.families.grouped_products.choice import grouped_mm

if TYPE_CHECKING:
    from peft.tuners.lora import ParamWrapper
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native


class Modalities(NamedTuple):
    """The indices of the tokens for the text experts and for the vision experts, among T tokens."""

    text: torch.Tensor
    """(T_text,)"""
    vision: torch.Tensor
    """(T_vision,)"""
    grouped: torch.Tensor
    """(T,): the two concatenated, a permutation of all tokens."""
    inverse: torch.Tensor
    """(T,): its inverse, each token's index in `grouped`."""

    @classmethod
    def of(cls, is_vision: torch.Tensor) -> "Modalities":
        """From (T,) flags; called by data workers, because on a GPU it would sync."""
        text, vision = (~is_vision).nonzero()[:, 0], is_vision.nonzero()[:, 0]
        return cls.from_indices(text, vision, torch.cat([text, vision]).argsort())

    @classmethod
    def from_indices(
        cls, text: torch.Tensor, vision: torch.Tensor, inverse: torch.Tensor
    ) -> "Modalities":
        return cls(text, vision, grouped=torch.cat([text, vision]), inverse=inverse)


def moe_block(
    block: "native.Ernie4_5_VLMoeMoeBlock",
    hidden: torch.Tensor,
    modalities: Modalities,
    *,
    output_router_logits: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(T, H) to (T, H), and the router logits (T, experts), None unless asked for.

    The logits are in grouped order, text before vision: the auxiliary loss only sums over them.
    """
    outputs, logits = [], []
    # (T_text, H) and (T_vision, H)
    by_modality = permute(hidden, modalities.grouped, modalities.inverse).split(
        [len(modalities.text), len(modalities.vision)]
    )
    for sparse, tokens in zip((block.text_moe, block.vision_moe), by_modality, strict=True):
        if len(tokens):
            router_logits, weights, top_k_index = route(sparse.gate, tokens)
            outputs.append(routed_experts(sparse.experts, tokens, top_k_index, weights))
            logits.append(router_logits)
    output = permute(torch.cat(outputs), modalities.inverse, modalities.grouped)
    if block.shared_experts is not None:
        output = output + feed_forward(block.shared_experts, hidden)
    return output, torch.cat(logits) if output_router_logits else None


def routed_experts(
    experts: "native.Ernie4_5_VLMoeMoeExperts | ParamWrapper",
    tokens: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of each token's experts, (T, H) to (T, H).

    Computed here if the experts are adapted, else by the implementation that is set for them.
    """
    loras = expert_loras(experts)
    if not loras:
        return experts(tokens, top_k_index, top_k_weights)
    return sorted_experts(experts.get_base_layer(), tokens, top_k_index, top_k_weights, loras)


def register() -> None:
    """Registers `sorted_experts` with Transformers, by the name `SORTED_EXPERTS`."""
    ALL_EXPERTS_FUNCTIONS.register(SORTED_EXPERTS, sorted_experts)


def sorted_experts(
    module: "native.Ernie4_5_VLMoeMoeExperts",
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    loras: Mapping[str, ExpertLora | CastLora] | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, (T, H) to (T, H), of indices and weights (T, k).

    Each token is copied to its k experts ("dispatch"), and the copies are sorted by expert. The
    routing weight is applied inside the MLP, where rows are narrowest, so that the MLP's output
    need not be saved for the gradient of the routing weight.
    """
    count, k = top_k_index.shape
    # Copy i of token t has index t·k + i. int16 makes the radix sort faster.
    expert_of_row, order = top_k_index.flatten().to(torch.int16).sort(stable=True)  # (T·k,) each
    # histc, because bincount syncs with the device.
    dtype = torch.float if hidden_states.device.type == "cpu" else torch.int
    tokens_per_expert = torch.histc(  # (E,)
        expert_of_row.to(dtype), bins=module.num_experts, max=module.num_experts - 1
    )
    offsets = tokens_per_expert.cumsum(0, dtype=torch.int32)  # (E,): where each expert's rows end
    rows = torch.arange(count * k, device=order.device)
    inverse = torch.empty_like(order).index_copy_(0, order, rows)  # (T·k,): copy to row

    def project(name: str, rows: torch.Tensor) -> torch.Tensor:
        """(T·k, in) to (T·k, out), each row by its expert's matrix, plus the adapter's."""
        weight = getattr(module, name)  # (E, out, in)
        out = frozen_grouped_mm(rows, weight, offsets)
        if loras is None or name not in loras:
            return out
        lora = loras[name]
        down, up = lora.in_dtype(weight.dtype)  # (E, in, r), (E, r, out)
        inner = grouped_mm(rows, down, offsets) * lora.scaling  # (T·k, r)
        return out + grouped_mm(inner, up, offsets)

    dispatched = _Dispatch.apply(hidden_states.to(module.gate_up_proj.dtype), order, inverse, k)
    row_weight = permute(top_k_weights.flatten(), order, inverse)  # (T·k,)
    inner = swiglu(project("gate_up_proj", dispatched), row_weight)  # (T·k, I)
    out = project("down_proj", inner)  # (T·k, H)
    return _Combine.apply(out, order, inverse, k).to(hidden_states.dtype)


def permute(values: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`values[order]`, (R, …) to (R, …), for a permutation and its inverse.

    The gradient is a gather with the inverse; that of plain indexing would be a scatter-add.
    """
    return _Permute.apply(values, order, inverse)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, values: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return values.index_select(0, order)

    @staticmethod
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _CopiesContext(Context, Protocol):
    k: int


class _Dispatch(torch.autograd.Function):
    """(T, H) to (T·k, H): row j is the token of copy `order[j]`. Its gradient sums over k."""

    @staticmethod
    def forward(
        ctx: _CopiesContext,
        tokens: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
        k: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return tokens.index_select(0, order // k)

    @staticmethod
    def backward(ctx: _CopiesContext, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return _sum_copies(grad, inverse, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """(T·k, H) to (T, H): the sum of each token's copies. Its gradient copies."""

    @staticmethod
    def forward(
        ctx: _CopiesContext, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _sum_copies(rows, inverse, k)

    @staticmethod
    def backward(ctx: _CopiesContext, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order // ctx.k), None, None, None


def _sum_copies(rows: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
    return rows.index_select(0, inverse).unflatten(0, (-1, k)).sum(1)
