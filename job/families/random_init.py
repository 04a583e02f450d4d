"""Random weights for an architecture, by a seed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def initialised(
    build: Callable[..., Any],
    config: Any,
    *,
    seed: int,
    dtype: "torch.dtype",
    device: "torch.device",
    keeps_fp32: Callable[[str], bool],
    **kwargs: Any,
) -> "PreTrainedModel":
    """The model that `build` makes of the config, in evaluation mode.

    Drawn on the CPU in fp32 whatever the machine, so that a seed means one set of weights.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = build(config, dtype=torch.float32, **kwargs)
    for name, parameter in model.named_parameters():  # buffers stay as they are computed
        parameter.data = parameter.data.to(device, None if keeps_fp32(name) else dtype)
    return model.to(device).eval()
