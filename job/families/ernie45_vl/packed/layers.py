"""The decoder layer and the vision block over packed sequences.

Subclasses of Transformers' own, put in their place by `use_packed_layers`: the same submodules,
called on (T, H) with the boundaries given. Without boundaries they do what their parents do.
"""

from typing import Any

import torch
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.ernie45_vl.packed.experts import Modalities, moe
from job.families.ernie45_vl.packed.feed_forward import feed_forward
from job.families.ernie45_vl.packed.rope import Angles, halves, neighbours, rotated
from job.families.ernie45_vl.packed.varlen_attention import Segments, attention, take
from job.families.lora.linear import in_parts, side_by_side


class PackedDecoderLayer(native.Ernie4_5_VLMoeDecoderLayer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        *args: Any,
        segments: Segments | None = None,
        modalities: Modalities | None = None,
        only: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """(T, H) to (T, H), and the router's logits (T, experts) or None in a dense layer.

        All tokens are attended to; where `only` names some, (S,), the output is theirs alone,
        (S, H), and `modalities` are theirs. With `segments`, `position_embeddings` are `Angles`.
        """
        if segments is None or modalities is None:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        out = self._attend(self.input_layernorm(hidden_states), position_embeddings, segments)
        if only is not None:
            hidden_states, out = take(hidden_states, only), take(out, only)
        [attended] = side_by_side((self.self_attn.o_proj,), out, kept=only is None)
        hidden = hidden_states + attended
        normed, logits = self.post_attention_layernorm(hidden), None
        if isinstance(self.mlp, native.Ernie4_5_VLMoeMoeBlock):
            output, logits = moe(self.mlp, normed, modalities)
        else:
            output = feed_forward(self.mlp, normed)
        return hidden + output, logits

    def read_together(self) -> list[tuple[torch.nn.Module, ...]]:
        inner, dense = self.self_attn, getattr(self.mlp, "shared_experts", self.mlp)
        attention = (inner.q_proj, inner.k_proj, inner.v_proj)
        return [attention] if dense is None else [attention, (dense.gate_proj, dense.up_proj)]

    def _attend(self, hidden: torch.Tensor, angles: Angles, segments: Segments) -> torch.Tensor:
        """(T, H) to (T, heads · D), before the output projection."""
        inner = self.self_attn
        query, key, value = (
            each.unflatten(-1, (-1, inner.head_dim))  # (T, heads, D)
            for each in side_by_side((inner.q_proj, inner.k_proj, inner.v_proj), hidden)
        )
        query, key = (rotated(each, angles, neighbours) for each in (query, key))
        return attention(query, key, value, segments, causal=True, scale=inner.scaling).flatten(1)


class PackedVisionBlock(native.Ernie4_5_VLMoeVisionBlock):
    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        position_embeddings: Any = None,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(patches, H) to (patches, H). With `segments`, `position_embeddings` are `Angles`."""
        if segments is None or position_embeddings is None:
            return super().forward(
                hidden_states, *args, position_embeddings=position_embeddings, **kwargs
            )
        inner, normed = self.attn, self.norm1(hidden_states)
        query, key, value = (
            each.unflatten(-1, (inner.num_heads, -1)) for each in in_parts(inner.qkv, normed, 3)
        )  # (patches, heads, D)
        query, key = (rotated(each, position_embeddings, halves) for each in (query, key))
        out = attention(query, key, value, segments, causal=False, scale=inner.scaling)
        [attended] = side_by_side((inner.proj,), out.flatten(1), kept=True)
        hidden = hidden_states + attended
        return hidden + self.mlp(self.norm2(hidden))


def use_packed_layers(model: Any) -> None:
    """Puts the packed layers in place of a native model's own; weights and names stay."""
    for layer in model.model.language_model.layers:
        layer.__class__ = PackedDecoderLayer
    for block in model.model.vision_tower.blocks:
        block.__class__ = PackedVisionBlock
