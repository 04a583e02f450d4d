"""PEFT's configuration of an adapter, from the spec's settings and the resolved targets."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from job.families.lora.patterns import alpha_of, independent_of_order, rank_of, shortest
from job.families.lora.target_groups import LoraTargets
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTERS = 2
"""Adapters in a parameter that fuses gate and up, if each has one."""


def lora_config(targets: LoraTargets, lora: LoraSpec) -> "LoraConfig":
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        **adapter_settings(targets, lora),
        use_dora=lora.use_dora,
        target_parameters=list(targets.parameters) or None,
        modules_to_save=list(targets.saved_modules) or None,
        ensure_weight_tying=targets.ties_embeddings,
    )


def adapter_settings(targets: LoraTargets, lora: LoraSpec) -> dict[str, Any]:
    """The adapter's settings that all engines share, by their names in PEFT."""
    names = (*targets.modules, *targets.parameters)
    ranks = {name: ADAPTERS * rank_of(name, lora) for name in targets.gate_up}
    alphas = {name: joint_alpha(name, lora) for name in targets.gate_up}
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "rank_pattern": independent_of_order((*shortest(ranks, names), *lora.rank_pattern), names),
        "alpha_pattern": independent_of_order(
            (*shortest(alphas, names), *lora.alpha_pattern), names
        ),
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
        "target_modules": list(targets.modules),
    }


def joint_alpha(name: str, lora: LoraSpec) -> int | float:
    """The alpha with which an adapter of twice the rank is scaled as the two that it stores."""
    factor = math.sqrt(ADAPTERS) if lora.use_rslora else ADAPTERS
    return alpha_of(name, lora) * factor


@contextmanager
def without_pattern_warnings() -> Iterator[None]:
    """Hides PEFT's warning about patterns, which it compares with modules, not with parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
