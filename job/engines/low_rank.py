"""LoRA on linear layers, computed in the dtype of the layer itself.

PEFT casts a layer's input to the adapter's fp32, and autocast casts it back: two copies of every
activation that serve nothing. Here the adapter's two small matrices are cast instead. The weights
that are trained, and all that the optimizer holds of them, stay fp32.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear

from job.families.adapters import alone


class LowRankLinear(Linear):
    """PEFT's own layer: names, files and merging are its parent's."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(…, inputs) to (…, outputs)."""
        name = alone(self)
        if args or kwargs or name is None or not _is_plain(self, name):
            return super().forward(x, *args, **kwargs)
        result: torch.Tensor = self.base_layer(x)
        dtype = result.dtype
        down, up = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
        if torch.compiler.is_compiling():
            return result + _Delta.apply(x.to(dtype), down, up, self.scaling[name])
        return result + linear(linear(x.to(dtype), down) * self.scaling[name], up)


class _Delta(torch.autograd.Function):
    """What an adapter adds, (…, out), from (…, in), (r, in) and (out, r), for compiled layers.

    It is scaled last, and so is the input's gradient: with a factor between a product and a sum the
    compiler lets whatever comes next take the sum along. Without one it adds in the product, for
    which the library copies all that is added to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        inner = linear(x, down)
        ctx.save_for_backward(x, inner, down, up)
        ctx.scaling = scaling
        return linear(inner, up) * scaling

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x, inner, down, up = ctx.saved_tensors
        by_inner = grad @ up  # (…, r)
        flat, rows = by_inner.flatten(0, -2), grad.flatten(0, -2)
        by_down = (flat.t() @ x.flatten(0, -2)) * ctx.scaling
        by_up = (rows.t() @ inner.flatten(0, -2)) * ctx.scaling
        return (by_inner @ down) * ctx.scaling, by_down, by_up, None


def use_low_rank_layers(model: torch.nn.Module) -> int:
    """Puts them in the place of PEFT's, where those do nothing more; gives their number."""
    layers: list[Any] = [module for module in model.modules() if type(module) is Linear]
    plain = [each for each in layers if all(_is_plain(each, name) for name in each.lora_A)]
    for layer in plain:
        layer.__class__ = LowRankLinear
    return len(plain)


def _is_plain(layer: Linear, name: str) -> bool:
    """Whether the adapter has no dropout, bias, or variant such as DoRA."""
    return (
        name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
    )
