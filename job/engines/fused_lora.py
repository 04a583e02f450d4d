"""Lays frozen linear layers and their adapters into one matrix each, for blocks that are compiled.

The weights move: a layer's own become a part of the matrix, so that nothing is held twice. What is
trained stays where it is, and is copied into the matrix before each forward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from job.families.lora.fused import FusedLoraLinear
from job.families.lora.linear import FusableBlock, LowRankLinear, is_plain_lora
from job.families.lora.peft_layers import sole_active_adapter


@dataclass(frozen=True)
class Laying:
    """The matrices of a model, with the layers of each."""

    laid: tuple[tuple[FusedLoraLinear, tuple[LowRankLinear, ...]], ...]
    refreshing: RemovableHandle

    def release(self) -> None:
        """Gives each layer weights of its own again."""
        self.refreshing.remove()
        for _, layers in self.laid:
            for layer in layers:
                layer.fused = None
                weight = layer.get_base_layer().weight
                weight.data = weight.data.contiguous()


def lay(model: nn.Module, blocks: Sequence[nn.Module]) -> Laying | None:
    """Lays what is adapted in the model's blocks, if anything is; each forward pass of the model
    begins with the adapters as they are then.
    """
    laid = tuple((_laid(layers), layers) for layers in _groups(blocks))
    each = [
        (layer, fused.adapter, *parts)
        for fused, layers in laid
        for layer, parts in zip(layers, fused.adapters(), strict=True)
    ]
    if not each:
        return None
    downs, ups = [down for *_, down, _ in each], [up for *_, up in each]

    def refresh(*_: Any) -> None:
        """All at once, as the device waits for it."""
        with torch.no_grad():
            own = [layer.lora_A[name].weight for layer, name, *_ in each]
            scaled = torch._foreach_mul(own, [layer.scaling[name] for layer, name, *_ in each])
            torch._foreach_copy_(downs, scaled)
            torch._foreach_copy_(ups, [layer.lora_B[name].weight for layer, name, *_ in each])

    return Laying(laid, model.register_forward_pre_hook(refresh))


def _laid(layers: tuple[LowRankLinear, ...]) -> FusedLoraLinear:
    name, bases = str(sole_active_adapter(layers[0])), [layer.get_base_layer() for layer in layers]
    ranks = [layer.r[name] for layer in layers]
    # Several have no biases.
    fused = FusedLoraLinear.of([base.weight.data for base in bases], bases[0].bias, ranks, name)
    for layer, base, weight in zip(layers, bases, fused.weights(), strict=True):
        base.weight.data = weight
        layer.fused = fused
    return fused


def _groups(blocks: Sequence[nn.Module]) -> Iterator[tuple[LowRankLinear, ...]]:
    """The adapted layers that can be laid, with those that read the same."""
    for block in blocks:
        grouped = set()
        for group in block.layers_computed_together() if isinstance(block, FusableBlock) else ():
            if _go_together(group):
                yield group
                grouped |= {id(layer) for layer in group}
        for layer in block.modules():
            if id(layer) not in grouped and _can_be_laid(layer):
                yield (layer,)


def _can_be_laid(layer: Any) -> TypeGuard[LowRankLinear]:
    if not isinstance(layer, LowRankLinear) or (name := sole_active_adapter(layer)) is None:
        return False
    base = layer.get_base_layer()
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    return frozen and type(base) is nn.Linear and is_plain_lora(layer, name)


def _go_together(layers: tuple[Any, ...]) -> TypeGuard[tuple[LowRankLinear, ...]]:
    if not all(_can_be_laid(layer) for layer in layers):
        return False
    bases = [layer.get_base_layer() for layer in layers]
    kinds = {
        (sole_active_adapter(layer), base.weight.dtype)
        for layer, base in zip(layers, bases, strict=True)
    }
    return len(kinds) == 1 and all(base.bias is None for base in bases)
