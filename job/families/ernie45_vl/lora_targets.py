"""LoRA targets of ERNIE-4.5-VL, selected by the spec's toggles or names.

The default targets are attention, the MLPs of dense layers and shared experts, the vision tower's
MLPs, and the resampler: what the published recipe names. A toggle that is off selects by part and
kind, as in Unsloth: the vision tower's attention too. Routed experts are modules in a published
checkpoint, and fused parameters in Transformers: `finetune_experts` adds them, and names of
`target_modules` such as `gate_proj` reach them as they would in the checkpoint. Either way gate and
up have an adapter each, as modules have; `target_parameters` names the parameters themselves, with
one adapter for both, as in PEFT.
"""

import re
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from job.errors import SpecError
from job.families.ernie45_vl.routed_experts import (
    as_modules,
    named_experts,
    require_one_pattern,
    require_plain,
)
from job.families.lora.selection import selected
from job.families.lora.target_groups import AdapterServing, LoraTargets, TargetGroup
from job.families.lora.targets import (
    ALL_LINEAR,
    LinearModules,
    matching,
    merged_settings,
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
    "vision attention": r"model\.vision_tower\.blocks\.\d+\.attn\.(qkv|proj)",
    "other modules": r".*",
}
PARAMETERS: dict[str, str] = {
    EXPERTS: r"model\.language_model\.layers\.\d+\.mlp\.(text|vision)_moe\.experts\."
    r"(gate_up|down)_proj",
    "other parameters": r".*",
}


WITHOUT_GRADIENT = (
    r"model\.language_model\.layers\.{last}\.mlp\.vision_moe\.experts\..*"
    r"|.*\.e_score_correction_bias"
)
"""Parameters without a gradient: the last layer's vision experts, because image tokens are never
supervised and no later layer reads their states; and the routers' correction biases."""


_Problem = tuple[str, str]
"""A reason and a fix."""
_USE_TOGGLE = "for the routed experts set finetune_experts: true"


def resolve(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
    """All modules and parameters that the spec selects, by full name.

    Raises SpecError if a name or pattern of the spec selects nothing.
    """
    linear = LinearModules.of(model)
    parameters = dict(model.named_parameters())
    last = model.config.text_config.num_hidden_layers - 1
    without_gradient = re.compile(WITHOUT_GRADIENT.format(last=last))
    trainable = [name for name in parameters if not without_gradient.fullmatch(name)]
    groups: list[TargetGroup] = []

    named: tuple[str, ...] = ()
    if lora.target_modules is not None:
        known = as_modules(matching(trainable, PARAMETERS[EXPERTS]), parameters)
        if not names_reach_experts(lora):
            known = {}
        modules, named = named_experts(linear, lora.target_modules, known)
        groups += _grouped(modules, MODULES, "modules")
    else:
        groups += [
            TargetGroup(name=group, modules=tuple(matching(linear.names, MODULES[group])))
            for group in _toggled(lora)
        ]
    if lora.target_parameters is not None:
        adapted = {f"{name}.weight" for group in groups for name in group.modules}
        chosen: list[str] = []
        for suffix_ in lora.target_parameters:
            matches = [name for name in trainable if name.endswith(suffix_)]
            if not any(name.endswith(suffix_) for name in parameters):
                problem: _Problem | None = ("names no parameter of the model", _USE_TOGGLE)
            else:
                problem = _problem({name: parameters[name] for name in matches}, adapted, linear)
            if problem is not None:
                reason, fix = problem
                raise SpecError("$.lora.target_parameters", reason, value=suffix_, fix=fix)
            chosen += [name for name in matches if name not in chosen]
        groups += _grouped(chosen, PARAMETERS, "parameters")
    else:
        experts = named
        if lora.finetune_experts:
            experts = tuple(matching(trainable, PARAMETERS[EXPERTS]))
        groups.append(
            TargetGroup(
                name=EXPERTS,
                parameters=experts,
                gate_up=tuple(name for name in experts if name.endswith("gate_up_proj")),
            )
        )
        require_plain(lora, named)
    targets = selected(model, groups, lora)
    require_one_pattern(lora, targets.gate_up)
    return targets


def _problem(
    matches: "Mapping[str, torch.nn.Parameter]", adapted: Set[str], linear: LinearModules
) -> _Problem | None:
    """Why these trainable parameters cannot be adapted, and the fix.

    `adapted` are the weights that target modules adapt.
    """
    if not matches:
        return "names parameters that get no gradient", "remove it"
    for name, parameter in matches.items():
        if parameter.ndim not in (2, 3):
            sizes = "x".join(map(str, parameter.shape))
            return f"names {name} of shape {sizes}: LoRA adapts only matrices", _USE_TOGGLE
    for name in matches:
        if "embed_tokens" in name:
            tied = ", which the output layer shares" if linear.tied else ""
            return f"names the embeddings {name}{tied}: LoRA does not adapt them", _USE_TOGGLE
    if twice := sorted(adapted & matches.keys()):
        module = twice[0].removesuffix(".weight")
        return (
            f"names {twice[0]}, which lora.target_modules or the toggles adapt already",
            f"remove it, or narrow them so that they do not select {module}",
        )
    return None


def serving(lora: LoraSpec) -> AdapterServing:
    """Which parts of the spec's adapter vLLM can serve; needs no model.

    vLLM 0.32 and 0.33 silently drop an adapter's weights for MLPs, vision tower and resampler,
    reject routed experts, DoRA and biases, and crash on shared experts.
    """
    if lora.target_modules is None:
        kinds = list(_toggled(lora))
    else:
        wanted = lora.target_modules
        if wanted == ALL_LINEAR:
            wanted = r"(?!lm_head$).*"
        matcher = wanted if isinstance(wanted, str) else "|".join(map(suffix, wanted))
        examples = _examples()
        if not names_reach_experts(lora):
            del examples[EXPERTS]
        kinds = [kind for kind, names in examples.items() if matching(names, matcher)]
    if lora.finetune_experts and EXPERTS not in kinds:
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


def names_reach_experts(lora: LoraSpec) -> bool:
    """Whether names of `target_modules` may select routed experts; PEFT's keyword does not."""
    unset = lora.finetune_experts is None and lora.target_parameters is None
    return unset and lora.target_modules not in (None, ALL_LINEAR)


def _toggled(lora: LoraSpec) -> tuple[str, ...]:
    """The groups that the spec's toggles turn on."""
    language, vision = lora.finetune_language_layers, lora.finetune_vision_layers
    attention, mlp = lora.finetune_attention_modules is not False, lora.finetune_mlp_modules
    # A resolved spec from when true was the default has it written, and selects what it did.
    written = lora.finetune_attention_modules is True
    recipe = (language or mlp) if written else (language and mlp)
    wanted = {
        ATTENTION: language and attention,
        "language mlp": language and mlp,
        "vision attention": vision and attention and not recipe,
        "vision mlp": vision and mlp,
        "resampler": vision and mlp,
    }
    return tuple(group for group, on in wanted.items() if on)


def _examples() -> dict[str, list[str]]:
    """Module names by kind, for a model with more layers than any checkpoint has."""
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
        EXPERTS: [
            f"{layer}.mlp.{modality}_moe.experts.{number}.{x}_proj"
            for layer in layers
            for modality in ("text", "vision")
            for number in range(4)
            for x in ("gate", "up", "down")
        ],
    }


def _grouped(names: list[str], kinds: dict[str, str], field: str) -> list[TargetGroup]:
    """Groups the names by kind: the first whose pattern matches."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        kind = next(kind for kind, pattern in kinds.items() if re.fullmatch(pattern, name))
        by_kind.setdefault(kind, []).append(name)
    return [
        TargetGroup(name=kind, **{field: tuple(by_kind[kind])}) for kind in kinds if kind in by_kind
    ]
