"""The MLP of dense layers and of shared experts, which all tokens pass through."""

import torch
from torch import nn
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.lora.linear import linear_together


def feed_forward(mlp: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """(T, H) to (T, H). A module that wraps the MLP, such as one trained in full, runs itself."""
    if not isinstance(mlp, native.Ernie4_5_VLMoeMLP):
        wrapped: torch.Tensor = mlp(hidden)
        return wrapped
    gate, up = linear_together((mlp.gate_proj, mlp.up_proj), hidden)  # (T, intermediate) each
    output: torch.Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
    return output
