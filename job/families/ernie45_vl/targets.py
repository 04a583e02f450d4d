"""Which parts of ERNIE-4.5-VL a LoRA adapter reaches, by the spec's toggles.

The reference is the tutorial's target list (q, k, v, o, gate, up, down, fc1, fc2): attention,
the dense and the shared experts' MLPs, the vision tower's MLPs and the resampler. Routed experts
are fused 3-D parameters, not modules: `finetune_experts` adds them as PEFT target parameters.
"""

import re
from typing import TYPE_CHECKING

from job.errors import SpecError
from job.families.base import LoraTargets
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPS: dict[str, str] = {
    "language attention": r"language_model\.layers\.\d+\.self_attn\.[qkvo]_proj$",
    "language mlp": r"language_model\.layers\.\d+\.mlp\.(shared_experts\.)?(gate|up|down)_proj$",
    "vision mlp": r"vision_tower\.blocks\.\d+\.mlp\.fc[12]$",
    "resampler": r"resampler_model\.(spatial|temporal)_linear\.fc[12]$",
}
EXPERTS = r"language_model\.layers\.\d+\.mlp\.(text|vision)_moe\.experts\.(gate_up|down)_proj$"


def resolve(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
    """Every module and parameter that the spec selects, by full name.

    Raises SpecError where a name or pattern of the spec selects nothing.
    """
    from torch import nn

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parameters = [name for name, _ in model.named_parameters()]
    groups: dict[str, int] = {}
    modules: list[str] = []
    chosen_parameters: list[str] = []

    if lora.target_modules is not None:
        modules = _named(linear, lora.target_modules)
        groups["named modules"] = len(modules)
    else:
        language, vision = lora.finetune_language_layers, lora.finetune_vision_layers
        wanted = {
            "language attention": language and lora.finetune_attention_modules,
            "language mlp": language and lora.finetune_mlp_modules,
            "vision mlp": vision and lora.finetune_mlp_modules,
            "resampler": vision and lora.finetune_mlp_modules,
        }
        for group, pattern in GROUPS.items():
            if wanted[group]:
                found = [name for name in linear if re.search(pattern, name)]
                modules += found
                groups[group] = len(found)

    if lora.target_parameters is not None:
        for wanted_name in lora.target_parameters:
            found = [name for name in parameters if name.endswith(wanted_name)]
            if not found:
                raise SpecError(
                    "$.lora.target_parameters",
                    "names no parameter of the model",
                    value=wanted_name,
                    fix="for the routed experts set finetune_experts: true",
                )
            chosen_parameters += found
        groups["named parameters"] = len(chosen_parameters)
    elif lora.finetune_experts:
        chosen_parameters = [name for name in parameters if re.search(EXPERTS, name)]
        groups["routed experts"] = len(chosen_parameters)

    if not modules and not chosen_parameters:
        raise SpecError(
            "$.lora", "selects no module of the model", fix="turn on a finetune_ toggle"
        )
    return LoraTargets(modules=tuple(modules), parameters=tuple(chosen_parameters), groups=groups)


def _named(linear: list[str], wanted: str | tuple[str, ...]) -> list[str]:
    """What PEFT would match: a regular expression on full names, or suffixes of them."""
    if isinstance(wanted, str):
        found = [name for name in linear if re.fullmatch(wanted, name)]
        if not found:
            raise SpecError(
                "$.lora.target_modules",
                "the regular expression matches no linear module's full name",
                value=wanted,
                fix=f"for example: '.*{re.escape(linear[0].rpartition('.')[2])}'",
            )
        return found
    chosen: list[str] = []
    for suffix in wanted:
        found = [name for name in linear if name == suffix or name.endswith(f".{suffix}")]
        if not found:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise SpecError(
                "$.lora.target_modules",
                "names no linear module of the model",
                value=suffix,
                fix=f"known names: {', '.join(known)}",
            )
        chosen += [name for name in found if name not in chosen]
    return chosen
