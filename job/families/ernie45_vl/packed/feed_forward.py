"""The MLP of dense layers and of shared experts, which all tokens pass through."""

from typing import TYPE_CHECKING

import torch

from job.families.lora.linear import linear_together

if TYPE_CHECKING:
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native


def feed_forward(mlp: "native.Ernie4_5_VLMoeMLP", hidden: torch.Tensor) -> torch.Tensor:
    """(T, H) to (T, H)."""
    gate, up = linear_together((mlp.gate_proj, mlp.up_proj), hidden)  # (T, intermediate) each
    output: torch.Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
    return output
