"""Stored adapters of gate and up: whether a file has one for both, or one each, by its values."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from job.engines.adapter_config import AdapterConfig
from job.engines.lora_config import ADAPTERS
from job.families.lora.adapter_names import BASE_LAYER, StoredName

if TYPE_CHECKING:
    import torch

_FUSED = "gate_up_proj"
"""Transformers' name for fused gate and up projections."""


def stored_gate_up(
    config: AdapterConfig,
    weights: Path,
    stored: Mapping[str, StoredName],
    rename: Callable[[str], str],
    parameters: "Mapping[str, torch.nn.Parameter]",
) -> frozenset[str]:
    """The model's fused parameters for which the file has an adapter each of gate and up.

    That is so if B is zero outside the blocks, see `lora.gate_up`. Zeros everywhere, as before
    training, tell nothing; then it is so if the rank is twice the adapter's.
    """
    from safetensors import safe_open

    from job.families.lora.gate_up import has_blocks

    found = set[str]()
    names = {(each.module, each.part): name for name, each in stored.items()}
    with safe_open(weights, framework="pt") as file:
        for (module, part), name in names.items():
            plain = module.replace(BASE_LAYER, "")
            parameter = parameters.get(f"{rename(plain)}.{_FUSED}")
            down = names.get((module, "lora_A"))
            if part != "lora_B" or parameter is None or parameter.ndim != 3 or down is None:
                continue
            outputs, inputs = (file.get_slice(each).get_shape() for each in (name, down))
            if (outputs[0], inputs[1]) != tuple(parameter.shape[1:]):  # of another parameter
                continue
            b = file.get_tensor(name)
            doubled = config.rank_of(f"{plain}.{_FUSED}") == ADAPTERS * config.r
            if has_blocks(b) and (doubled or bool(b.any())):
                found.add(f"{rename(plain)}.{_FUSED}")
    return frozenset(found)
