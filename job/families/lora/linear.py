"""LoRA on linear layers, computed in the dtype of the layer itself.

PEFT casts a layer's input to the adapter's fp32, and autocast casts it back: two copies of every
activation that serve nothing. Here the adapter's two small matrices are cast instead. The weights
that are trained, and all that the optimizer holds of them, stay fp32.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear

from job.families.lora.fused import Wide
from job.families.lora.peft_layers import alone
from job.families.split_gradients import frozen_in_parts


class LowRankLinear(Linear):
    """PEFT's own layer: names, files and merging are its parent's."""

    wide: Wide | None = None
    """The matrix that its weights were laid into, alone or with those of other layers."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(…, inputs) to (…, outputs)."""
        name = alone(self)
        if args or kwargs or name is None or not is_plain(self, name):
            return super().forward(x, *args, **kwargs)
        if made := _by_matrix([self], x):
            return made[0]
        result: torch.Tensor = self.base_layer(x)
        dtype = result.dtype
        down, up = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
        return result + linear(linear(x.to(dtype), down) * self.scaling[name], up)


@runtime_checkable
class ReadTogether(Protocol):
    """A block that computes some of its layers by `side_by_side`."""

    def read_together(self) -> list[tuple[torch.nn.Module, ...]]:
        """The layers of each call."""


def side_by_side(
    layers: Sequence[Any], x: torch.Tensor, *, kept: bool = False
) -> list[torch.Tensor]:
    """What each of the layers makes of x (…, inputs); in compiled blocks by one product.

    `kept` says that whatever made x keeps it for its own gradient, as attention does.
    """
    return _by_matrix(layers, x, kept=kept) or [layer(x) for layer in layers]


def in_parts(layer: Any, x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """What the layer makes of x (…, inputs), in equal parts, (…, outputs / count) each."""
    if made := _by_matrix([layer], x, parts=count):
        return made
    if torch.compiler.is_compiling() and _is_frozen(layer) and _as_it_is(x, layer):
        return frozen_in_parts(x, layer.weight, layer.bias, count)
    return list(layer(x).unflatten(-1, (count, -1)).unbind(-2))


def _by_matrix(
    layers: Sequence[Any], x: torch.Tensor, *, parts: int | None = None, kept: bool = False
) -> list[torch.Tensor] | None:
    """What these layers make of x, by the matrix that just they lie in.

    None where there is none, or another adapter is active.
    """
    first = layers[0]
    if not torch.compiler.is_compiling() or not isinstance(first, LowRankLinear):
        return None
    wide, name = first.wide, alone(first)
    if wide is None or len(wide.outputs) != len(layers) or name != wide.adapter:
        return None
    # For gradients alone; in the matrix the scaling is there already.
    downs = [layer.lora_A[name].weight * layer.scaling[name] for layer in layers]
    ups = [layer.lora_B[name].weight for layer in layers]
    return wide(x, downs, ups, parts=parts, kept=kept)


def _is_frozen(layer: torch.nn.Module) -> bool:
    if type(layer) is not torch.nn.Linear:
        return False
    return not any(parameter.requires_grad for parameter in layer.parameters())


def _as_it_is(x: torch.Tensor, layer: Any) -> bool:
    """Whether the layer computes in the dtype of its input."""
    return x.dtype == layer.weight.dtype and not torch.is_autocast_enabled(x.device.type)


def use_low_rank_layers(model: torch.nn.Module) -> int:
    """Puts them in the place of PEFT's, where those do nothing more; gives their number."""
    layers: list[Any] = [module for module in model.modules() if type(module) is Linear]
    plain = [each for each in layers if all(is_plain(each, name) for name in each.lora_A)]
    for layer in plain:
        layer.__class__ = LowRankLinear
    return len(plain)


def is_plain(layer: Linear, name: str) -> bool:
    """Whether the adapter has no dropout, bias, or variant such as DoRA."""
    return (
        name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
    )
