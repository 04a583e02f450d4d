"""LoRA on linear layers, computed in the dtype of the layer itself.

PEFT casts a layer's input to the adapter's fp32, and autocast casts it back: two copies of every
activation that serve nothing. Here the adapter's two small matrices are cast instead. The weights
that are trained, and all that the optimizer holds of them, stay fp32.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear


class LowRankLinear(Linear):
    """PEFT's own layer: names, files and merging are its parent's."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(…, inputs) to (…, outputs)."""
        # Another adapter may join later, as the stored one does where it is proven.
        alone = self.active_adapters == list(self.lora_A) and len(self.lora_A) == 1
        if args or kwargs or self.disable_adapters or self.merged or not alone:
            return super().forward(x, *args, **kwargs)
        result: torch.Tensor = self.base_layer(x)
        dtype = result.dtype
        (name,) = self.lora_A
        down, up = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
        return result + linear(linear(x.to(dtype), down) * self.scaling[name], up)


def use_low_rank_layers(model: torch.nn.Module) -> int:
    """Puts them in the place of PEFT's, where those do nothing more; gives their number."""
    layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for layer in layers:
        layer.__class__ = LowRankLinear
    return len(layers)


def _is_plain(layer: Linear) -> bool:
    """One adapter without dropout, bias, or a variant such as DoRA."""
    return (
        len(layer.lora_A) == 1
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(isinstance(drop, torch.nn.Identity) for drop in layer.lora_dropout.values())
    )
