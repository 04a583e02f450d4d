"""Counts the floating-point operations of ERNIE-4.5-VL's forward pass.

Text and image tokens have routed experts of different sizes, so the count depends on both.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from job.families.encoded import RowSize
from job.families.ernie45_vl.activation_memory import head_dim
from job.families.step_flops import ForwardFlops, causal_attention

if TYPE_CHECKING:
    from transformers import (
        Ernie4_5_VLMoeConfig,
        Ernie4_5_VLMoeTextConfig,
        Ernie4_5_VLMoeVisionConfig,
    )


def forward_flops(config: "Ernie4_5_VLMoeConfig", rows: Sequence[RowSize]) -> ForwardFlops:
    """The operations of a forward pass over the rows; two per weight and token."""
    text = config.text_config
    common, routed = _token_weights(text)
    images = sum(row.image_tokens for row in rows)
    weights = (
        sum(row.tokens for row in rows) * common
        + sum(row.tokens - row.image_tokens for row in rows) * routed[0]
        + images * routed[1]
        + sum(row.supervised_tokens for row in rows) * text.hidden_size * text.vocab_size
    )
    return ForwardFlops(
        vision=_vision(config.vision_config, text.hidden_size, rows),
        language=2.0 * weights + causal_attention(text, rows),
    )


def _token_weights(text: "Ernie4_5_VLMoeTextConfig") -> tuple[int, list[int]]:
    """The weights that each token meets, and those of routed experts that text and images do."""
    hidden = text.hidden_size
    attention = hidden * head_dim(text) * 2 * (text.num_attention_heads + text.num_key_value_heads)
    sparse = sum(kind == "sparse" for kind in text.mlp_layer_types)
    dense = len(text.mlp_layer_types) - sparse
    shared = 3 * hidden * text.moe_intermediate_size[0] * text.moe_num_shared_experts
    common = (
        (sparse + dense) * attention
        + dense * 3 * hidden * text.intermediate_size
        + sparse * (shared + hidden * text.moe_num_experts)
    )
    return common, [
        sparse * text.moe_k * 3 * hidden * inner for inner in text.moe_intermediate_size
    ]


def _vision(
    tower: "Ernie4_5_VLMoeVisionConfig", text_hidden: int, rows: Sequence[RowSize]
) -> float:
    """The tower, whose attention is within an image, and the resampler."""
    hidden, patches = tower.hidden_size, [count for row in rows for count in row.patches]
    block = 4 * hidden**2 + 2 * hidden * tower.intermediate_size
    embedding = hidden * tower.in_channels * tower.patch_size**2
    merged = hidden * tower.spatial_merge_size**2
    # Spatial: two matrices of merged². Temporal: three, because its first matrix is twice as wide.
    resampler = merged * merged * 5 + merged * text_hidden
    weights = sum(patches) * (tower.depth * block + embedding)
    weights += sum(patches) / tower.spatial_merge_size**2 * resampler
    scores = 4.0 * tower.depth * hidden * sum(count**2 for count in patches)
    return 2.0 * weights + scores
