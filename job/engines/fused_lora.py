"""Fuses frozen linear layers and their adapters into one matrix each, for compiled blocks.

A layer's weight becomes a view of the matrix, so that no weight is stored twice. The adapters'
weights stay in place, and are copied into the matrix before each forward pass.

The only interface with `job.families.lora`: `fuse_adapters` sets `LoraLinear.fused`, which the
layer uses while its block is compiled; `FusedLora.release` resets it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from job.families.four_bit.tensor import FourBitTensor
from job.families.lora.fused import FusedLoraLinear
from job.families.lora.linear import FusableBlock, LoraLinear, is_plain_lora
from job.families.lora.peft_layers import sole_active_adapter

Layers = tuple[LoraLinear, ...]


@dataclass
class FusedLora:
    """The fused matrices of a model, with the layers of each; empty once released."""

    groups: list[tuple[FusedLoraLinear, Layers]]
    refresh_hook: RemovableHandle

    def release(self) -> None:
        """Gives each layer its own weight again; frees each matrix once its weights are copied.

        If memory is short this happens before training, which then needs that of the matrices.
        """
        self.refresh_hook.remove()
        while self.groups:
            _, layers = self.groups.pop()
            for layer in layers:
                layer.fused = None
                weight = layer.get_base_layer().weight
                weight.data = weight.data.contiguous()


def fuse_adapters(model: nn.Module, blocks: Sequence[nn.Module]) -> FusedLora | None:
    """Fuses the adapted layers of the blocks; None if there are none.

    A hook copies the adapters' current weights before each forward pass of the model.
    """
    groups = [(_fuse(layers), layers) for layers in _groups(blocks)]
    each = [
        (layer, fused.adapter, *parts)
        for fused, layers in groups
        for layer, parts in zip(layers, fused.adapters(), strict=True)
    ]
    if not each:
        return None
    downs, ups = [down for *_, down, _ in each], [up for *_, up in each]

    def refresh(*_: object) -> None:
        """Copies the adapters' weights into the matrices, in few kernels for all layers."""
        with torch.no_grad():
            own = [layer.lora_A[name].weight for layer, name, *_ in each]
            scaled = torch._foreach_mul(own, [layer.scaling[name] for layer, name, *_ in each])
            torch._foreach_copy_(downs, scaled)
            torch._foreach_copy_(ups, [layer.lora_B[name].weight for layer, name, *_ in each])

    return FusedLora(groups, model.register_forward_pre_hook(refresh))


def _fuse(layers: Layers) -> FusedLoraLinear:
    name, bases = str(sole_active_adapter(layers[0])), [layer.get_base_layer() for layer in layers]
    ranks = [layer.r[name] for layer in layers]
    # Layers that share a matrix have no biases.
    fused = FusedLoraLinear.of([base.weight.data for base in bases], bases[0].bias, ranks, name)
    for layer, base, weight in zip(layers, bases, fused.weights(), strict=True):
        base.weight.data = weight
        layer.fused = fused
    return fused


def _groups(blocks: Sequence[nn.Module]) -> Iterator[Layers]:
    """The adapted layers that can be fused, grouped by the input they share."""
    for block in blocks:
        grouped = set()
        for group in block.layers_computed_together() if isinstance(block, FusableBlock) else ():
            if _can_share_matrix(group):
                yield group
                grouped |= {id(layer) for layer in group}
        for layer in block.modules():
            if id(layer) not in grouped and _can_be_fused(layer):
                yield (layer,)


def _can_be_fused(layer: nn.Module) -> TypeGuard[LoraLinear]:
    if not isinstance(layer, LoraLinear) or (name := sole_active_adapter(layer)) is None:
        return False
    base = layer.get_base_layer()
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    plain = type(base) is nn.Linear and not isinstance(base.weight, FourBitTensor)
    return frozen and plain and is_plain_lora(layer, name)


def _can_share_matrix(layers: tuple[nn.Module, ...]) -> TypeGuard[Layers]:
    if not all(_can_be_fused(layer) for layer in layers):
        return False
    bases = [layer.get_base_layer() for layer in layers]  # type: ignore[operator]
    kinds = {
        (sole_active_adapter(layer), base.weight.dtype)
        for layer, base in zip(layers, bases, strict=True)
    }
    return len(kinds) == 1 and all(base.bias is None for base in bases)
