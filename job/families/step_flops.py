"""Counts the floating-point operations of a training step: those of the model, not the hardware's.

As usual for MFU, what a device computes twice (gradient checkpointing) or in vain (padding) does
not count. A matrix takes two operations per weight and token in the forward pass. The backward pass
takes as many for the gradient of its input, and again as many for that of the weight, if it is
trained: a LoRA step is two forward passes, a full one three. Adapters themselves, norms and
activation functions, less than 3% together, are ignored.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.families.vision_tower import CONNECTOR, vision_tower_pattern

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from job.families.encoded import RowSize

VISION = ("vision attention", "vision mlp", "connector", "resampler")
"""LoRA target groups that are used only by rows with images."""
_EXPERT = re.compile(r"(^|\.)experts(\.\d+)?\.")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Floating-point operations of a forward pass."""

    vision: float
    """Of the vision tower and of what connects it to the language model."""
    language: float
    """Of the language model, with logits of supervised tokens only."""


def training_flops(forward: ForwardFlops, groups: Collection[str] | None) -> float:
    """The operations of a training step: forward and backward.

    `groups` are the names of the LoRA target groups; None if all weights are trained. Gradients
    reach the vision tower only if something in it is trained.
    """
    if groups is None:
        return 3 * (forward.vision + forward.language)
    vision = 2 if any(name in VISION for name in groups) else 1
    return vision * forward.vision + 2 * forward.language


def causal_attention(config: "PreTrainedConfig", rows: Sequence["RowSize"]) -> float:
    """Scores and weighted values of all layers; on average a token sees half of its row."""
    heads = getattr(config, "num_attention_heads", 0) or 0
    head = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    layers = getattr(config, "num_hidden_layers", 0) or 0
    return 2.0 * layers * heads * head * sum(row.tokens**2 for row in rows)


def forward_flops(model: "PreTrainedModel", rows: Sequence["RowSize"]) -> ForwardFlops:
    """The operations of any model's forward pass, from the shapes of its weights.

    Weights of the vision tower are used once per patch, those of its connector once per image
    token, those of the output layer once per supervised token, a routed expert's by its share of
    the tokens, and all others once per token. The vision tower's attention scores are ignored.
    """
    tower = vision_tower_pattern(model)
    images = sum(row.image_tokens for row in rows)
    patches = sum(sum(row.patches) or row.image_tokens for row in rows)
    vision = language = 0.0
    text = model.config.get_text_config()
    share = _first(text, _CHOSEN, 1) / max(_first(text, _EXPERTS, 1), 1)
    for name, weight in _matrices(model):
        operations = 2.0 * weight.numel()
        if tower is not None and tower.match(name):
            vision += operations * patches
        elif tower is not None and CONNECTOR.search(name):
            vision += operations * images
        else:
            used = share if _EXPERT.search(name) else 1.0
            language += operations * used * sum(row.tokens for row in rows)
    head = model.get_output_embeddings()
    if head is not None:
        supervised = sum(row.supervised_tokens for row in rows)
        language += 2.0 * math.prod(head.weight.shape) * supervised
    return ForwardFlops(vision=vision, language=language + causal_attention(text, rows))


def _matrices(model: "PreTrainedModel") -> "Iterator[tuple[str, torch.Tensor]]":
    """The weights of the base's matrix products and convolutions, without the output layer's."""
    import torch

    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) or module is head or ".lora_" in f".{path}":
            continue
        for name, weight in module.named_parameters(recurse=False):
            convolves = isinstance(module, torch.nn.modules.conv._ConvNd)
            fused = weight.dim() == 3 and _EXPERT.search(f"{path}.{name}")
            if weight.dim() == 2 or fused or (convolves and weight.dim() > 2):
                yield f"{path}.{name}", weight


def _first(config: "PreTrainedConfig", names: Sequence[str], default: int) -> int:
    """The first of the config's values with one of the names that is a number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), default)
