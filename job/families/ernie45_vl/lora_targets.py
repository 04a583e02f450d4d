"""Which parts of ERNIE-4.5-VL a LoRA adapter reaches, by the spec's toggles or names.

The reference is the tutorial's target list (q, k, v, o, gate, up, down, fc1, fc2): attention,
the dense and the shared experts' MLPs, the vision tower's MLPs and the resampler. Routed experts
are fused 3-D parameters, not modules: `finetune_experts` adds them as PEFT target parameters.
"""

import re
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

from job.errors import SpecError
from job.families.base import AdapterServing, LoraTargets, TargetGroup
from job.families.lora.targets import (
    ALL_LINEAR,
    Linear,
    matching,
    merged_settings,
    selected,
    suffix,
)
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch
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


UNREACHED = (
    r"model\.language_model\.layers\.{last}\.mlp\.vision_moe\.experts\..*"
    r"|.*\.e_score_correction_bias"
)
"""What no gradient reaches: image tokens, whose experts these are, predict nothing, and from the
last layer their states go nowhere else; and what corrects the choice of experts."""


def resolve(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
    """Every module and parameter that the spec selects, by full name.

    Raises SpecError where a name or pattern of the spec selects nothing.
    """
    linear = Linear.of(model)
    parameters = dict(model.named_parameters())
    unreached = re.compile(UNREACHED.format(last=model.config.text_config.num_hidden_layers - 1))
    reached = [name for name in parameters if not unreached.fullmatch(name)]
    groups: list[TargetGroup] = []

    if lora.target_modules is not None:
        groups += _sorted_out(linear.named(lora.target_modules), MODULES, "modules")
    else:
        groups += [
            TargetGroup(name=group, modules=tuple(matching(linear.names, MODULES[group])))
            for group in _toggled(lora)
        ]
    if lora.target_parameters is not None:
        taken = {f"{name}.weight" for group in groups for name in group.modules}
        chosen: list[str] = []
        for wanted in lora.target_parameters:
            named = [name for name in parameters if name.endswith(wanted)]
            found = [name for name in reached if name in named]
            if reason := _hindrance(wanted, named, found, parameters, taken, linear):
                raise SpecError("$.lora.target_parameters", reason[0], value=wanted, fix=reason[1])
            chosen += [name for name in found if name not in chosen]
        groups += _sorted_out(chosen, PARAMETERS, "parameters")
    elif lora.finetune_experts:
        found = matching(reached, PARAMETERS[EXPERTS])
        groups.append(TargetGroup(name=EXPERTS, parameters=tuple(found)))

    return selected(groups)


def _hindrance(
    wanted: str,
    named: Sequence[str],
    reached: Sequence[str],
    parameters: "Mapping[str, torch.nn.Parameter]",
    taken: Set[str],
    linear: Linear,
) -> tuple[str, str] | None:
    """Why the parameters that end so cannot be adapted, and what to do."""
    experts = "for the routed experts set finetune_experts: true"
    if not named:
        return "names no parameter of the model", experts
    if not reached:
        return "names parameters that no gradient reaches", "remove it"
    flat = [name for name in reached if parameters[name].ndim not in (2, 3)]
    if flat:
        sizes = "x".join(map(str, parameters[flat[0]].shape))
        return f"names {flat[0]} of {sizes}: matrices alone are adapted", experts
    embeddings = [name for name in reached if "embed_tokens" in name]
    if embeddings:
        shared = ", which the output layer shares" if linear.tied else ""
        return f"names {embeddings[0]}, a table of embeddings{shared}: none is adapted", experts
    if twice := sorted(taken & {*reached}):
        module = twice[0].removesuffix(".weight")
        return (
            f"names {twice[0]}, which lora.target_modules or the toggles adapt already",
            f"leave it to them, or narrow them so that they do not name {module}",
        )
    return None


def serving(lora: LoraSpec) -> AdapterServing:
    """What of the spec's adapter vLLM can serve; from the spec alone, before any model is there.

    vLLM 0.32 and 0.33 drop what an adapter holds for MLPs, vision tower and resampler without a
    word, refuse routed experts, and fail on shared ones. Adapters with DoRA or biases they refuse.
    """
    if lora.target_modules is None:
        kinds = list(_toggled(lora))
    else:
        wanted = lora.target_modules
        if wanted == ALL_LINEAR:
            wanted = r"(?!lm_head$).*"
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
