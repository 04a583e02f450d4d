"""LoRA target modules of Transformers' models, selected by name or by kind.

A module's kind is derived from whether it is inside the language model, and from common names of
its parents: `self_attn`, `attn`, `mlp`, `feed_forward`. Other modules can be selected by name only,
because a wrong guess would train unwanted modules.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.errors import SpecError
from job.families.lora.selection import selected
from job.families.lora.target_groups import AdapterServing, LoraTargets, TargetGroup
from job.families.vision_tower import CONNECTOR
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
"""PEFT's keyword for every linear module except the output layer."""
LANGUAGE = ("language attention", "language mlp")
VISION = ("vision attention", "vision mlp", "connector")
OTHER = "other modules"
_FIELD = "$.lora.target_modules"
_ATTENTION = re.compile(r"(^|\.)[a-z_]*(attn|attention)\.")
_MLP = re.compile(r"(^|\.)([a-z_]*mlp|feed_forward|ffn)\.")
_ROUTER = re.compile(r"\.(gate|router|shared_expert_gate)$")
_SERVED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The module names of language models whose adapters vLLM serves."""


@dataclass(frozen=True, kw_only=True)
class LinearModules:
    """The linear modules of a model, by full name."""

    names: tuple[str, ...]
    """All linear modules, except a tied output layer."""
    head: str | None
    """The output layer."""
    tied: str | None
    """The output layer, if its weight is tied to the embeddings."""
    others: tuple[str, ...]
    """Other modules with weights: embeddings, convolutions, norms."""

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "LinearModules":
        from torch import nn

        own = {name for name, _ in model.named_parameters()}  # tied weights appear once
        named = dict(model.named_modules())
        linear = [name for name, module in named.items() if isinstance(module, nn.Linear)]
        output = model.get_output_embeddings()
        head = next((name for name in linear if named[name] is output), None)
        own_names = tuple(name for name in linear if f"{name}.weight" in own)
        return cls(
            names=own_names,
            head=head,
            tied=head if head not in own_names else None,
            others=tuple(n for n in named if n not in linear and f"{n}.weight" in own),
        )

    def named(self, wanted: str | tuple[str, ...]) -> list[str]:
        """Matches like PEFT: its keyword, a regular expression for full names, or name suffixes.

        Raises SpecError if one of them selects nothing, or tied weights.
        """
        if wanted == ALL_LINEAR:
            return [name for name in self.names if name != self.head]
        if isinstance(wanted, str):
            matches = matching(self.names, wanted)
            if not matches:
                if self.tied and re.fullmatch(wanted, self.tied):
                    raise _tied(self.tied)
                raise SpecError(
                    _FIELD,
                    "the regular expression matches no linear module's full name",
                    value=wanted,
                    fix=f"for example: '.*{re.escape(self.names[0].rpartition('.')[2])}'",
                )
            return matches
        chosen: list[str] = []
        for ending in wanted:
            matches = matching(self.names, suffix(ending))
            if not matches:
                raise self._no_match(ending)
            chosen += [name for name in matches if name not in chosen]
        return chosen

    def _no_match(self, ending: str) -> SpecError:
        """Why the suffix selects no module."""
        if self.tied and re.fullmatch(suffix(ending), self.tied):
            return _tied(self.tied)
        known = ", ".join(sorted({name.rpartition(".")[2] for name in self.names}))
        other = matching(self.others, suffix(ending))
        reason = (
            f"names {other[0]}, which is not a linear module: LoRA adapts no others"
            if other
            else "names no linear module of the model"
        )
        return SpecError(_FIELD, reason, value=ending, fix=f"known names: {known}")


def _tied(head: str) -> SpecError:
    return SpecError(
        _FIELD,
        "names the output layer, which shares its weight with the embeddings: merging the adapter "
        "would change both",
        value=head,
        fix=f"remove {head}",
    )


def resolve(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
    """All modules that the spec selects, by full name.

    Raises SpecError if a name selects nothing, or if the spec selects parameters such as fused
    experts, which cannot be adapted in these families.
    """
    for key in ("finetune_experts", "target_parameters"):
        if getattr(lora, key):
            raise SpecError(
                f"$.lora.{key}",
                "selects bare parameters, which this model's family cannot adapt",
                fix="remove the line; LoRA adapts the linear modules",
            )
    linear = LinearModules.of(model)
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    prefix = f"{path}." if path else ""  # the model may itself be the decoder
    wanted, chosen = _toggled(lora), list(linear.names)
    if lora.target_modules is not None:
        wanted, chosen = (*LANGUAGE, *VISION, OTHER), linear.named(lora.target_modules)
    kinds: dict[str, list[str]] = {}
    for name in chosen:
        kinds.setdefault(kind_of(name, prefix), []).append(name)
    groups = [TargetGroup(name=k, modules=tuple(kinds[k])) for k in wanted if k in kinds]
    return selected(model, groups, lora)


def serving(lora: LoraSpec, *, reads_images: bool) -> AdapterServing:
    """Which parts of the spec's adapter vLLM can serve: linear modules of the language model.

    Only the spec is known, so modules by name count only if the model has no vision tower.
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
    """The settings in use for which vLLM rejects an adapter."""
    settings = (
        ("DoRA", lora.use_dora),
        ("trained biases", lora.bias != "none"),
        ("modules_to_save", bool(lora.modules_to_save)),
        # vLLM reads one rank and one alpha for a whole adapter.
        ("rank_pattern", bool(lora.rank_pattern)),
        ("alpha_pattern", bool(lora.alpha_pattern)),
    )
    return tuple(name for name, on in settings if on)


def kind_of(name: str, prefix: str) -> str:
    """The kind of a linear module; `prefix` is the path of the language model."""
    part = "language" if name.startswith(prefix) else "vision"
    if "audio" in name or _ROUTER.search(name):
        return OTHER
    if part == "vision" and CONNECTOR.search(name):
        return "connector"
    if _ATTENTION.search(name):
        return f"{part} attention"
    return f"{part} mlp" if _MLP.search(name) else OTHER


def _toggled(lora: LoraSpec) -> tuple[str, ...]:
    """The kinds that the toggles turn on."""
    language, vision = lora.finetune_language_layers, lora.finetune_vision_layers
    attention, mlp = lora.finetune_attention_modules is not False, lora.finetune_mlp_modules
    wanted = {
        "language attention": language and attention,
        "language mlp": language and mlp,
        "vision attention": vision and attention,
        "vision mlp": vision and mlp,
        "connector": vision and mlp,
    }
    return tuple(kind for kind, on in wanted.items() if on)


def matching(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name)]


def suffix(name: str) -> str:
    return rf"(.*\.)?{re.escape(name)}"
