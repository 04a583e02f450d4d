"""LoRA on linear layers, computed in the dtype of the base layer.

PEFT casts a layer's input to the adapter's fp32, and autocast casts it back: two useless copies of
every activation. Here the adapter's two small matrices are cast instead. The adapter's weights and
their optimizer state stay in fp32.
"""

from collections.abc import Sequence
from typing import Protocol, TypeGuard, cast, runtime_checkable

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.nn.functional import linear

from job.families.class_swap import swap_class
from job.families.lora.fused import FusedLoraLinear
from job.families.lora.peft_layers import sole_active_adapter
from job.families.split_gradients import split_frozen_linear


class LoraLinear(Linear):
    """PEFT's linear layer with another forward pass; names, files and merging are unchanged."""

    fused: FusedLoraLinear | None = None
    """The matrix that holds this layer's weights, alone or with other layers'; see `lora`."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """(…, in) to (…, out)."""
        name = sole_active_adapter(self)
        if args or kwargs or name is None or not is_plain_lora(self, name):
            return super().forward(x, *args, **kwargs)
        if outputs := _by_matrix([self], x):
            return outputs[0]
        result: torch.Tensor = self.base_layer(x)
        dtype = result.dtype
        down, up = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
        return result + linear(linear(x.to(dtype), down) * self.scaling[name], up)


@runtime_checkable
class FusableBlock(Protocol):
    """A block that computes some of its layers with `linear_together`."""

    def layers_computed_together(self) -> list[tuple[nn.Module, ...]]:
        """The layers of each call of `linear_together`."""


def linear_together(
    layers: Sequence[nn.Module], x: torch.Tensor, *, input_saved: bool = False
) -> list[torch.Tensor]:
    """The output of each layer for x (…, in); one matrix product if the layers are fused.

    `input_saved` means that the previous operation saves x for its backward pass, as attention
    does.
    """
    return _by_matrix(layers, x, input_saved=input_saved) or [layer(x) for layer in layers]


def linear_in_parts(layer: nn.Module, x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The layer's output for x (…, in) in equal parts, (…, out / count) each."""
    if parts := _by_matrix([layer], x, parts=count):
        return parts
    if torch.compiler.is_compiling() and _is_frozen(layer) and _preserves_dtype(layer, x):
        return split_frozen_linear(x, layer.weight, layer.bias, count)
    return list(layer(x).unflatten(-1, (count, -1)).unbind(-2))


def _by_matrix(
    layers: Sequence[nn.Module],
    x: torch.Tensor,
    *,
    parts: int | None = None,
    input_saved: bool = False,
) -> list[torch.Tensor] | None:
    """The layers' outputs, computed with the fused matrix that holds exactly these layers.

    None if there is no such matrix, if another adapter is active, or in eager mode.
    """
    first = layers[0]
    if not torch.compiler.is_compiling() or not isinstance(first, LoraLinear):
        return None
    fused, name = first.fused, sole_active_adapter(first)
    if fused is None or len(fused.outputs) != len(layers) or name != fused.adapter:
        return None
    adapted = cast(Sequence[LoraLinear], layers)
    # These only receive gradients; the matrix has copies of them, with the scaling applied.
    downs = [layer.lora_A[name].weight * layer.scaling[name] for layer in adapted]
    ups = [layer.lora_B[name].weight for layer in adapted]
    return fused(x, downs, ups, parts=parts, input_saved=input_saved)


def _is_frozen(layer: nn.Module) -> TypeGuard[nn.Linear]:
    if type(layer) is not nn.Linear:
        return False
    return not any(parameter.requires_grad for parameter in layer.parameters())


def _preserves_dtype(layer: nn.Linear, x: torch.Tensor) -> bool:
    """Whether the layer computes in the dtype of its input."""
    return x.dtype == layer.weight.dtype and not torch.is_autocast_enabled(x.device.type)


def use_lora_linear(model: nn.Module) -> int:
    """Replaces PEFT's linear layers that are `is_plain_lora`; returns their number."""
    layers = [cast(Linear, module) for module in model.modules() if type(module) is Linear]
    plain = [layer for layer in layers if all(is_plain_lora(layer, name) for name in layer.lora_A)]
    for layer in plain:
        swap_class(layer, LoraLinear)
    return len(plain)


def is_plain_lora(layer: Linear, name: str) -> bool:
    """Whether the adapter has no dropout, bias, or variant such as DoRA."""
    return (
        name not in layer.lora_variant
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
    )
