"""Chooses the weights that are packed into 4 bits.

As Transformers does, all linear layers except the output layer; and the routed experts, which hold
most weights of a mixture of experts. Vision towers and connectors stay, as in Unsloth: they are
small, and what they lose shows in every answer. Embeddings, norms and routers stay too, and weights
that bitsandbytes cannot count.
"""

import re
from typing import TYPE_CHECKING

from job.families.four_bit import FourBit
from job.families.vision_tower import CONNECTOR, vision_tower_pattern

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_ROUTER = re.compile(r"(^|\.)(gate|router|score|shared_expert_gate)$")

LARGEST = 2**31 - 2**16
"""Values of a weight that is packed: bitsandbytes' kernels count them, in whole tiles, in int32,
and larger numbers wrap around in silence."""


def packed_names(model: "PreTrainedModel", four_bit: FourBit) -> "dict[str, torch.Tensor]":
    """The parameters that are packed, by full name; `model` may be on the meta device."""
    from torch import nn

    head, tower = model.get_output_embeddings(), vision_tower_pattern(model)
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        # The pattern of a tower leaves out the connector, which stays as well.
        of_images = tower is not None and (tower.match(name) or CONNECTOR.search(name))
        if of_images or module is head or _is_skipped(name, four_bit):
            continue
        if type(module) is nn.Linear and not _ROUTER.search(name):
            found[f"{name}.weight"] = module.weight
        elif type(module).__name__.endswith("Experts"):
            found |= {
                f"{name}.{own}": parameter
                for own, parameter in module.named_parameters(recurse=False)
                if parameter.ndim == 3
            }
    return {name: weight for name, weight in found.items() if weight.numel() <= LARGEST}


def _is_skipped(name: str, four_bit: FourBit) -> bool:
    """Whether the module, or one that contains it, ends with a name to skip."""
    return any(f".{name}.".find(f".{ending}.") >= 0 for ending in four_bit.skip)
