"""A dense layer's MLP, and that of the experts which every token takes."""

from typing import Any

import torch

from job.families.lora.linear import side_by_side


def feed_forward(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    """An `Ernie4_5_VLMoeMLP` on (T, H)."""
    gate, up = side_by_side((mlp.gate_proj, mlp.up_proj), hidden)
    output: torch.Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
    return output
