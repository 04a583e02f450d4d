"""Names for routed experts: the modules of a published checkpoint, as Transformers' parameters.

A checkpoint has `experts.3.gate_proj`, `experts.3.up_proj` and `experts.3.down_proj`; Transformers
has `experts.gate_up_proj` and `experts.down_proj`, each for all experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from job.errors import SpecError
from job.families.lora.patterns import value_of
from job.families.lora.targets import LinearModules
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch

_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_WITHOUT = "set lora.finetune_experts: false, which leaves them out"

Experts = dict[str, tuple[str, ...]]
"""By the full name of a fused parameter, the full names of its modules in a checkpoint."""


def as_modules(names: Sequence[str], parameters: "Mapping[str, torch.Tensor]") -> Experts:
    """The modules of these parameters (E, out, in)."""
    found: Experts = {}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        numbers = range(parameters[name].shape[0])
        found[name] = tuple(f"{stem}.{n}.{part}" for n in numbers for part in _PROJECTIONS[leaf])
    return found


def named_experts(
    linear: LinearModules, wanted: str | tuple[str, ...], experts: Experts
) -> tuple[list[str], tuple[str, ...]]:
    """The linear modules, and the parameters of `experts`, that the names select.

    Raises SpecError if a name selects nothing, or a part of a parameter.
    """
    modules = tuple(module for each in experts.values() for module in each)
    chosen = replace(linear, names=(*linear.names, *modules)).named(wanted)
    reached, parameters = {*chosen}, []
    for name, parts in experts.items():
        missing = [part for part in parts if part not in reached]
        if len(missing) == len(parts):
            continue
        if missing:
            raise SpecError(
                "$.lora.target_modules",
                f"selects a part of {name}, which this model stores and adapts as one: not "
                f"{missing[0]}",
                value=wanted if isinstance(wanted, str) else ", ".join(wanted),
                fix=f"select all of it, gate_proj with up_proj; or {_WITHOUT}",
            )
        parameters.append(name)
    in_experts = {*modules}
    return [name for name in chosen if name not in in_experts], tuple(parameters)


def require_plain(lora: LoraSpec, named: Sequence[str]) -> None:
    """Raises SpecError for settings that PEFT does not support for the parameters `named`."""
    for key, plain in (("use_dora", False), ("lora_dropout", 0)):
        if named and getattr(lora, key) != plain:
            raise SpecError(
                f"$.lora.{key}",
                f"must be {str(plain).lower()}: target_modules reaches routed experts, such as "
                f"{named[0]}, for which PEFT does not support it",
                value=getattr(lora, key),
                fix=f"remove the line, or {_WITHOUT}",
            )


def require_one_pattern(lora: LoraSpec, gate_up: Sequence[str]) -> None:
    """Raises SpecError if a pattern names `gate_proj` or `up_proj`, and misses the experts'."""
    for key, default in (("rank_pattern", lora.r), ("alpha_pattern", lora.lora_alpha)):
        patterns = getattr(lora, key)
        for name in gate_up if patterns else ():
            stem, _, leaf = name.rpartition(".")
            own = value_of(name, patterns, default)
            for part in _PROJECTIONS[leaf]:
                value = value_of(f"{stem}.0.{part}", patterns, own)
                if value != own:
                    raise SpecError(
                        f"$.lora.{key}",
                        f"gives {part} {value}, but routed experts, which store gate and up as "
                        f"{leaf}, {own}",
                        value=dict(patterns),
                        fix=f"put {leaf}: {value} first, for both; or {leaf}: {own}, and name "
                        f"shared_experts.{part} and layers.0.mlp.{part} instead of {part}",
                    )
