"""Seeded random weights for an architecture."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from job.families.transformers_format import attention_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def initialized(
    build: "Callable[..., PreTrainedModel]",
    config: "PreTrainedConfig",
    *,
    seed: int,
    dtype: "torch.dtype",
    device: "torch.device",
    keeps_fp32: Callable[[str], bool],
    attn_implementation: str | None,
) -> "PreTrainedModel":
    """The model that `build` creates from the config, with random weights, in evaluation mode.

    Initialized on the CPU in fp32 on every machine, so that the seed alone determines the weights.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config, dtype=torch.float32, **attention_arguments(attn_implementation))
    for name, parameter in model.named_parameters():  # buffers keep their dtype
        parameter.data = parameter.data.to(device, None if keeps_fp32(name) else dtype)
    return model.to(device).eval()
