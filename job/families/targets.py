"""Modules for LoRA by their names: as a spec names them, and by kind in models of Transformers.

Kinds go by where a module stands (in the language model, or beside it) and by the usual names of
its parents: `self_attn`, `attn`, `mlp`, `feed_forward`. What has no such name is reached by name
only: a kind that is guessed wrong would train what nobody asked for.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from job.errors import SpecError
from job.families.base import AdapterServing, LoraTargets, TargetGroup
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LANGUAGE = ("language attention", "language mlp")
VISION = ("vision attention", "vision mlp", "connector")
OTHER = "other modules"
_ATTENTION = re.compile(r"(^|\.)[a-z_]*(attn|attention)\.")
_MLP = re.compile(r"(^|\.)([a-z_]*mlp|feed_forward|ffn)\.")
_CONNECTOR = re.compile(r"merger|connector|projector|modality_projection|resampler")
_ROUTER = re.compile(r"\.(gate|router|shared_expert_gate)$")
_SERVED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The usual names of a language model's modules."""


def resolve(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
    """Every module of a model of Transformers that the spec selects, by full name.

    Raises SpecError where a name selects nothing, or for what these families do not adapt: bare
    parameters, such as fused experts.
    """
    from torch import nn

    for key in ("finetune_experts", "target_parameters"):
        if getattr(lora, key):
            raise SpecError(
                f"$.lora.{key}",
                "adapts bare parameters, which this model's family does not",
                fix="remove the line; linear modules are adapted",
            )
    own = {name for name, _ in model.named_parameters()}  # of tied weights one name
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in own
    ]
    decoder = model.get_decoder()
    place = next(name for name, module in model.named_modules() if module is decoder)
    inside = f"{place}." if place else ""  # the model itself is one
    wanted, chosen = _toggled(lora), linear
    if lora.target_modules is not None:
        wanted, chosen = (*LANGUAGE, *VISION, OTHER), named(linear, lora.target_modules)
    kinds: dict[str, list[str]] = {}
    for name in chosen:
        kinds.setdefault(kind_of(name, inside), []).append(name)
    return selected([TargetGroup(name=k, modules=tuple(kinds[k])) for k in wanted if k in kinds])


def serving(lora: LoraSpec, *, reads_images: bool) -> AdapterServing:
    """What of the spec's adapter vLLM can serve: linear modules of the language model.

    From the spec alone: of modules named by hand it cannot tell which the vision tower has too.
    """
    if lora.target_modules is None:
        kinds = [kind for kind in _toggled(lora) if reads_images or kind in LANGUAGE]
        servable = tuple(kind for kind in kinds if kind in LANGUAGE)
        merged_only = [kind for kind in kinds if kind not in LANGUAGE]
    else:
        known = not isinstance(lora.target_modules, str) and set(lora.target_modules) <= {*_SERVED}
        served = known and not reads_images
        servable = ("modules by name",) if served else ()
        merged_only = [] if served else ["modules by name"]
    return AdapterServing(servable=servable, merged_only=(*merged_only, *merged_settings(lora)))


def merged_settings(lora: LoraSpec) -> tuple[str, ...]:
    """The settings whose adapters vLLM refuses."""
    settings = (("DoRA", lora.use_dora), ("trained biases", lora.bias != "none"))
    return tuple(said for said, on in settings if on)


def selected(groups: Sequence[TargetGroup]) -> LoraTargets:
    """The groups as targets. Raises SpecError where they are empty."""
    if not any(len(group) for group in groups):
        raise SpecError(
            "$.lora", "selects no module of the model", fix="turn on a finetune_ toggle"
        )
    return LoraTargets(groups=tuple(groups))


def kind_of(name: str, inside: str) -> str:
    """The kind of a linear module; names in the language model start with `inside`."""
    part = "language" if name.startswith(inside) else "vision"
    if "audio" in name or _ROUTER.search(name):
        return OTHER
    if part == "vision" and _CONNECTOR.search(name):
        return "connector"
    if _ATTENTION.search(name):
        return f"{part} attention"
    return f"{part} mlp" if _MLP.search(name) else OTHER


def _toggled(lora: LoraSpec) -> tuple[str, ...]:
    """The kinds that the toggles turn on."""
    language, vision = lora.finetune_language_layers, lora.finetune_vision_layers
    wanted = {
        "language attention": language and lora.finetune_attention_modules,
        "language mlp": language and lora.finetune_mlp_modules,
        "vision attention": vision and lora.finetune_attention_modules,
        "vision mlp": vision and lora.finetune_mlp_modules,
        "connector": vision and lora.finetune_mlp_modules,
    }
    return tuple(kind for kind, on in wanted.items() if on)


def matching(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name)]


def suffix(name: str) -> str:
    return rf"(.*\.)?{re.escape(name)}"


def named(linear: list[str], wanted: str | tuple[str, ...]) -> list[str]:
    """What PEFT would match: a regular expression on full names, or suffixes of them."""
    if isinstance(wanted, str):
        found = matching(linear, wanted)
        if not found:
            raise SpecError(
                "$.lora.target_modules",
                "the regular expression matches no linear module's full name",
                value=wanted,
                fix=f"for example: '.*{re.escape(linear[0].rpartition('.')[2])}'",
            )
        return found
    chosen: list[str] = []
    for ending in wanted:
        found = matching(linear, suffix(ending))
        if not found:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise SpecError(
                "$.lora.target_modules",
                "names no linear module of the model",
                value=ending,
                fix=f"known names: {', '.join(known)}",
            )
        chosen += [name for name in found if name not in chosen]
    return chosen
