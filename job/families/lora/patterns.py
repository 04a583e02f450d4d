"""Ranks and alphas by module: the spec's `rank_pattern` and `alpha_pattern`, matched as in PEFT.

A pattern matches the end of a full name, from the start of one of its dotted parts; the first
pattern that matches decides. Values are of one adapter: a parameter with an adapter each for gate
and up has two, which PEFT stores as one (see `gate_up`).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from job.errors import SpecError
from job.spec.foreign_names import nearest
from job.spec.types import LoraSpec

Number = TypeVar("Number", int, float)


def rank_of(name: str, lora: LoraSpec) -> int:
    """The rank of the adapter of a module or parameter, by its full name."""
    return value_of(name, lora.rank_pattern, lora.r)


def alpha_of(name: str, lora: LoraSpec) -> int:
    """The alpha of the adapter of a module or parameter, by its full name."""
    return value_of(name, lora.alpha_pattern, lora.lora_alpha)


def max_rank(lora: LoraSpec) -> int:
    """The largest rank that any module may have."""
    return max(lora.r, *(rank for _, rank in lora.rank_pattern), 0)


def scaling_of(name: str, lora: LoraSpec) -> float:
    """The factor of the adapter's output: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    rank, alpha = rank_of(name, lora), alpha_of(name, lora)
    return alpha / (math.sqrt(rank) if lora.use_rslora else rank)


def value_of(name: str, patterns: Iterable[tuple[str, Number]], default: Number) -> Number:
    """The value of the first pattern that matches the full name."""
    return next((value for key, value in patterns if _matches(key, name)), default)


def require_matches(lora: LoraSpec, names: Iterable[str]) -> None:
    """Raises SpecError for a pattern that matches none of the adapted modules and parameters."""
    names = list(names)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(lora, key):
            if any(_matches(pattern, name) for name in names):
                continue
            in_full = [name for name in lora.modules_to_save or () if _matches(pattern, name)]
            endings = sorted({name.rpartition(".")[2] for name in names})
            close, known = nearest(pattern, endings), ", ".join(endings)
            fix = f"write {close}" if close else f"names of adapted modules: {known}"
            if in_full:
                fix = f"remove it: lora.modules_to_save trains {', '.join(in_full)} in full"
            raise SpecError(f"$.lora.{key}", "matches no adapted module", value=pattern, fix=fix)


def independent_of_order(
    patterns: Sequence[tuple[str, Number]], names: Iterable[str]
) -> dict[str, Number]:
    """The patterns, for a file that does not keep their order.

    As they are, unless two of them match one of `names` with different values: then that name
    itself is the pattern, for each name that any of them matches.
    """
    names = list(names)
    if all(len({value for key, value in patterns if _matches(key, name)}) <= 1 for name in names):
        return dict(patterns)
    matched = [name for name in names if any(_matches(key, name) for key, _ in patterns)]
    return dict(exact({name: value_of(name, patterns, patterns[0][1]) for name in matched}))


def exact(values: Mapping[str, Number]) -> tuple[tuple[str, Number], ...]:
    """Patterns that each match one full name."""
    return tuple((f"^{re.escape(name)}", value) for name, value in values.items())


def shortest(values: Mapping[str, Number], names: Iterable[str]) -> tuple[tuple[str, Number], ...]:
    """Patterns that match those of `names` that have a value: one for all if it suffices."""
    endings = {".".join(name.split(".")[-2:]) for name in values}
    if len(endings) == len({*values.values()}) == 1:
        pattern = re.escape(endings.pop())
        if {name for name in names if _matches(pattern, name)} == values.keys():
            return ((pattern, next(iter(values.values()))),)
    return exact(values)


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
