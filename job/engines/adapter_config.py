"""Reads an adapter's `adapter_config.json`: those settings that its tensors do not tell."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from job import log
from job.errors import InputError
from job.families.adapter_files import CONFIG
from job.families.lora.patterns import value_of
from job.spec.types import Patterns

READ = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout"),
        *("bias", "target_modules", "target_parameters", "exclude_modules", "modules_to_save"),
        *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "use_rslora"),
        *("use_dora", "init_lora_weights", "ensure_weight_tying", "loftq_config", "eva_config"),
    }
)
"""Settings that are read here, or that do not change what an adapter computes."""
_MERGE = "merge it with the tool that made it, and use the merged model"
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initializations that change the base's weights: such an adapter fits no other base."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The settings of an adapter. Unset ones have PEFT's defaults."""

    uri: str
    base: str | None
    """The base model that it names."""
    r: int
    lora_alpha: int
    rank_pattern: Patterns
    alpha_pattern: tuple[tuple[str, float], ...]
    bias: Literal["none", "all", "lora_only"]
    use_rslora: bool
    target_modules: str | tuple[str, ...] | None
    """As stored."""
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]

    @classmethod
    def read(cls, uri: str, directory: Path) -> "AdapterConfig":
        """Raises InputError if it cannot be read, or if its kind is not supported."""
        try:
            stored = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                uri, f"its {CONFIG} is not JSON: {error}", fix="copy it again"
            ) from error
        if not isinstance(stored, dict):
            raise InputError(uri, f"its {CONFIG} is not a JSON object", fix="copy it again")
        _require_supported(uri, stored)
        try:
            return cls(
                uri=uri,
                base=stored.get("base_model_name_or_path") or None,
                r=_integer(stored.get("r", 8)),
                lora_alpha=_integer(stored.get("lora_alpha", 8)),
                rank_pattern=_patterns(stored.get("rank_pattern"), _integer),
                alpha_pattern=_patterns(stored.get("alpha_pattern"), _number),
                bias=stored.get("bias") or "none",
                use_rslora=bool(stored.get("use_rslora")),
                target_modules=_names(stored.get("target_modules"), or_text=True),
                target_parameters=tuple(_names(stored.get("target_parameters")) or ()),
                modules_to_save=tuple(_names(stored.get("modules_to_save")) or ()),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                uri, f"its {CONFIG} has a setting of the wrong type: {error}", fix="copy it again"
            ) from error

    def rank_of(self, name: str) -> int:
        """The rank that it sets for a module or parameter, by the name it had in training."""
        return value_of(name, self.rank_pattern, self.r)

    def alpha_of(self, name: str, adapters: int = 1) -> int:
        """The alpha that it sets, of each of the `adapters` that it stores as one.

        With rsLoRA that of the whole is not a whole number. Raises InputError if each one's is not.
        """
        stored = value_of(name, self.alpha_pattern, float(self.lora_alpha))
        alpha = stored / (math.sqrt(adapters) if self.use_rslora else adapters)
        if not math.isclose(alpha, round(alpha)):
            raise InputError(
                self.uri, f"its alpha at {name} is not a whole number", value=stored, fix=_MERGE
            )
        return round(alpha)


def _require_supported(uri: str, stored: dict[str, Any]) -> None:
    from peft import LoraConfig

    kind = stored.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(uri, f"is an adapter of the kind {kind}, not LORA", fix=_MERGE)
    start = stored.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise InputError(
            uri,
            f"was initialized by {start}, which changes the base model's weights",
            fix="convert it with PEFT: save_pretrained(…, path_initial_model_for_weight_conversion="
            "…)",
        )
    if stored.get("bias") not in (None, "none", "all", "lora_only"):
        raise InputError(uri, f"its bias is {stored['bias']!r}", fix="copy the adapter again")
    defaults = LoraConfig()
    known = {field.name for field in fields(defaults)}
    for name, value in stored.items():
        if name in READ or value in (None, False, {}, []):
            continue
        if name not in known:
            log.warn("the adapter has a setting that PEFT does not know; ignored", setting=name)
        elif value != getattr(defaults, name):
            raise InputError(
                uri, f"sets {name}, which this version does not support", value=value, fix=_MERGE
            )


def _integer(value: object) -> int:
    if not isinstance(value, int | float) or value != int(value):
        raise TypeError(f"{value!r} is not a whole number")
    return int(value)


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return int(value) if value == int(value) else value


Number = TypeVar("Number", int, float)


def _patterns(
    value: dict[str, object] | None, read: Callable[[object], Number]
) -> tuple[tuple[str, Number], ...]:
    return tuple((key, read(number)) for key, number in (value or {}).items())


def _names(value: object, *, or_text: bool = False) -> Any:  # noqa: ANN401 - text if `or_text`
    if value is None or (or_text and isinstance(value, str)):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} is not a list of names")
    return tuple(value)
