"""The vision block and the decoder layer over packed sequences.

Subclasses of Transformers' layers that `use_packed_layers` swaps in: the same submodules, called on
(T, H) with the sequences' boundaries. Without boundaries they behave like their parents.
"""

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.class_swap import swap_class
from job.families.ernie45_vl.packed.experts import Modalities, moe_block
from job.families.ernie45_vl.packed.feed_forward import feed_forward
from job.families.ernie45_vl.packed.rope import (
    RotaryAngles,
    apply_rope,
    swap_halves,
    swap_neighbors,
)
from job.families.ernie45_vl.packed.varlen_attention import PackedSequences, attention, gather
from job.families.lora.linear import linear_in_parts, linear_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CachedSequences(Protocol):
    """Sequences whose earlier keys and values are in a cache; see `decoder`."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Stores keys and values of the tokens, and attends to all that are stored: (T, heads, D)
        to (T, heads, D)."""


CosSin = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, which Transformers calls `position_embeddings`."""


class PackedDecoderLayer(native.Ernie4_5_VLMoeDecoderLayer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: RotaryAngles | CosSin,
        *args: object,
        sequences: PackedSequences | CachedSequences | None = None,
        modalities: Modalities | None = None,
        output_indices: torch.Tensor | None = None,
        output_router_logits: bool = True,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | torch.Tensor:
        """(T, H) to (T, H), and the router logits (T, experts), None in a dense layer or if not
        asked for.

        With `output_indices` (S,), every token is attended to, but the output is computed for those
        tokens only, (S, H), and `modalities` has to cover only them too.
        """
        if sequences is None or modalities is None:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        angles = cast(RotaryAngles, position_embeddings)
        out = self._attention(self.input_layernorm(hidden_states), angles, sequences)
        if output_indices is not None:
            hidden_states, out = (
                gather(hidden_states, output_indices),
                gather(out, output_indices),
            )  # (S, ·) each
        [attended] = linear_together(
            (self.self_attn.o_proj,), out, input_saved=output_indices is None
        )
        hidden = hidden_states + attended
        normed, logits = self.post_attention_layernorm(hidden), None
        if isinstance(self.mlp, native.Ernie4_5_VLMoeMoeBlock):
            output, logits = moe_block(
                self.mlp, normed, modalities, output_router_logits=output_router_logits
            )
        else:
            output = feed_forward(self.mlp, normed)
        return hidden + output, logits

    def layers_computed_together(self) -> list[tuple[nn.Module, ...]]:
        attn, dense = self.self_attn, getattr(self.mlp, "shared_experts", self.mlp)
        qkv = (attn.q_proj, attn.k_proj, attn.v_proj)
        return [qkv] if dense is None else [qkv, (dense.gate_proj, dense.up_proj)]

    def _attention(
        self,
        hidden: torch.Tensor,
        angles: RotaryAngles,
        sequences: PackedSequences | CachedSequences,
    ) -> torch.Tensor:
        """(T, H) to (T, heads · D), before the output projection."""
        attn = self.self_attn
        query, key, value = (
            projected.unflatten(-1, (-1, attn.head_dim))  # (T, heads, D)
            for projected in linear_together((attn.q_proj, attn.k_proj, attn.v_proj), hidden)
        )
        query, key = (apply_rope(each, angles, swap_neighbors) for each in (query, key))
        if isinstance(sequences, PackedSequences):
            out = attention(query, key, value, sequences, causal=True, scale=attn.scaling)
        else:
            out = sequences.attend(attn.layer_idx, query, key, value, attn.scaling)
        return out.flatten(1)


class PackedVisionBlock(native.Ernie4_5_VLMoeVisionBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: object,
        position_embeddings: RotaryAngles | CosSin | None = None,
        sequences: PackedSequences | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """(patches, H) to (patches, H); patches attend within their image."""
        if sequences is None or position_embeddings is None:
            return super().forward(
                hidden_states, *args, position_embeddings=position_embeddings, **kwargs
            )
        attn, angles = self.attn, cast(RotaryAngles, position_embeddings)
        normed = self.norm1(hidden_states)
        query, key, value = (
            projected.unflatten(-1, (attn.num_heads, -1))  # (patches, heads, D)
            for projected in linear_in_parts(attn.qkv, normed, 3)
        )
        query, key = (apply_rope(each, angles, swap_halves) for each in (query, key))
        out = attention(query, key, value, sequences, causal=False, scale=attn.scaling)
        [attended] = linear_together((attn.proj,), out.flatten(1), input_saved=True)
        hidden = hidden_states + attended
        return hidden + self.mlp(self.norm2(hidden))


def use_packed_layers(model: "PreTrainedModel") -> None:
    """Swaps the packed layers in; weights and names do not change."""
    for layer in model.model.language_model.layers:
        swap_class(layer, PackedDecoderLayer)
    for block in model.model.vision_tower.blocks:
        swap_class(block, PackedVisionBlock)
