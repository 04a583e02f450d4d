"""Which parts of ERNIE-4.5-VL a LoRA adapter reaches, by the spec's toggles or names.

The reference is the tutorial's target list (q, k, v, o, gate, up, down, fc1, fc2): attention,
the dense and the shared experts' MLPs, the vision tower's MLPs and the resampler. Routed experts
are fused 3-D parameters, not modules: `finetune_experts` adds them as PEFT target parameters.
"""

import re
from typing import TYPE_CHECKING

from job.errors import SpecError
from job.families.base import AdapterServing, LoraTargets, TargetGroup
from job.families.targets import matching, merged_settings, named, selected, suffix
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION, EXPERTS = "language attention", "routed experts"
MODULES: dict[str, str] = {
    ATTENTION: r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "language mlp": r"model\.language_model\.layers\.\d+\.mlp\.(shared_experts\.)?"
    r"(gate|up|down)_proj",
    "vision mlp": r"model\.vision_tower\.blocks\.\d+\.mlp\.fc[12]",
    "resampler": r"model\.resampler_model\.(spatial|temporal)_linear\.fc[12]",
    # Reached by name only.
    "vision attention": r"model\.vision_tower\.blocks\.\d+\.attn\.(qkv|proj)",
    "other modules": r".*",
}
PARAMETERS: dict[str, str] = {
    EXPERTS: r"model\.language_model\.layers\.\d+\.mlp\.(text|vision)_moe\.experts\."
    r"(gate_up|down)_proj",
    "other parameters": r".*",
}


def resolve(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
    """Every module and parameter that the spec selects, by full name.

    Raises SpecError where a name or pattern of the spec selects nothing.
    """
    from torch import nn

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parameters = [name for name, _ in model.named_parameters()]
    groups: list[TargetGroup] = []

    if lora.target_modules is not None:
        groups += _sorted_out(named(linear, lora.target_modules), MODULES, "modules")
    else:
        groups += [
            TargetGroup(name=group, modules=tuple(matching(linear, MODULES[group])))
            for group in _toggled(lora)
        ]
    if lora.target_parameters is not None:
        chosen: list[str] = []
        for wanted in lora.target_parameters:
            found = [name for name in parameters if name.endswith(wanted)]
            if not found:
                raise SpecError(
                    "$.lora.target_parameters",
                    "names no parameter of the model",
                    value=wanted,
                    fix="for the routed experts set finetune_experts: true",
                )
            chosen += found
        groups += _sorted_out(chosen, PARAMETERS, "parameters")
    elif lora.finetune_experts:
        found = matching(parameters, PARAMETERS[EXPERTS])
        groups.append(TargetGroup(name=EXPERTS, parameters=tuple(found)))

    return selected(groups)


def serving(lora: LoraSpec) -> AdapterServing:
    """What of the spec's adapter vLLM can serve; from the spec alone, before any model is there.

    vLLM 0.32 and 0.33 drop what an adapter holds for MLPs, vision tower and resampler without a
    word, refuse routed experts, and fail on shared ones. Adapters with DoRA or biases they refuse.
    """
    if lora.target_modules is None:
        kinds = list(_toggled(lora))
    else:
        wanted = lora.target_modules
        matcher = wanted if isinstance(wanted, str) else "|".join(map(suffix, wanted))
        kinds = [kind for kind, names in _examples().items() if matching(names, matcher)]
    if lora.finetune_experts:
        kinds.append(EXPERTS)
    for name in lora.target_parameters or ():
        routed = name.endswith(("gate_up_proj", "down_proj"))
        kinds.append(EXPERTS if routed else "other parameters")
    return AdapterServing(
        servable=tuple(kind for kind in kinds if kind == ATTENTION),
        merged_only=tuple(
            dict.fromkeys([*(k for k in kinds if k != ATTENTION), *merged_settings(lora)])
        ),
    )


def _toggled(lora: LoraSpec) -> tuple[str, ...]:
    """The groups that the toggles turn on."""
    language, vision = lora.finetune_language_layers, lora.finetune_vision_layers
    wanted = {
        ATTENTION: language and lora.finetune_attention_modules,
        "language mlp": language and lora.finetune_mlp_modules,
        "vision mlp": vision and lora.finetune_mlp_modules,
        "resampler": vision and lora.finetune_mlp_modules,
    }
    return tuple(group for group, on in wanted.items() if on)


def _examples() -> dict[str, list[str]]:
    """Names of modules by kind, of a model with more layers than there is."""
    layers = [f"model.language_model.layers.{n}" for n in range(128)]
    blocks = [f"model.vision_tower.blocks.{n}" for n in range(128)]
    mlps = [f"{layer}.mlp{part}" for layer in layers for part in ("", ".shared_experts")]
    halves = [f"model.resampler_model.{kind}_linear" for kind in ("spatial", "temporal")]
    return {
        ATTENTION: [f"{layer}.self_attn.{x}_proj" for layer in layers for x in "qkvo"],
        "language mlp": [f"{mlp}.{x}_proj" for mlp in mlps for x in ("gate", "up", "down")],
        "vision mlp": [f"{block}.mlp.{x}" for block in blocks for x in ("fc1", "fc2")],
        "resampler": [f"{half}.{x}" for half in halves for x in ("fc1", "fc2")],
        "vision attention": [f"{block}.attn.{x}" for block in blocks for x in ("qkv", "proj")],
        "other modules": ["lm_head", "model.resampler_model.mlp"],
    }


def _sorted_out(names: list[str], kinds: dict[str, str], field: str) -> list[TargetGroup]:
    """Named targets by kind, each in the first that it matches."""
    found: dict[str, list[str]] = {}
    for name in names:
        kind = next(kind for kind, pattern in kinds.items() if re.fullmatch(pattern, name))
        found.setdefault(kind, []).append(name)
    return [
        TargetGroup(name=kind, **{field: tuple(found[kind])}) for kind in kinds if kind in found
    ]
