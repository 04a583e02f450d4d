"""Checks of the lora section, and of the export that depends on it."""

import re
from collections.abc import Iterator

from job.spec import keys
from job.spec.foreign_names import quoted
from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, finding

ALL_LINEAR = "all-linear"
"""PEFT's name for all linear modules except the output layer."""
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_positions")
_USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
_TOGGLES = (
    "finetune_vision_layers",
    "finetune_language_layers",
    "finetune_attention_modules",
    "finetune_mlp_modules",
)


def _full_excludes_lora_keys(at: View) -> Iterator[Finding]:
    if at("lora.method") != "full":
        return
    for name, value in at("lora").items():
        on = name in _TOGGLES and value is True  # the default, or was, as in resolved specs
        if name != "method" and value != keys.default(f"lora.{name}") and not on:
            yield finding(
                f"lora.{name}",
                "does not apply if lora.method is full, which trains every weight",
                "remove the line, or set lora.method: lora",
            )


def _full_requires_merged(at: View) -> Iterator[Finding]:
    if at("lora.method") == "full" and not at("export.merged.enabled"):
        yield finding(
            "export.merged.enabled",
            "must be true if lora.method is full: nothing else would be exported",
            "set export.merged.enabled: true",
        )


def _something_is_trained(at: View) -> Iterator[Finding]:
    if at("lora.method") != "lora" or at("lora.finetune_experts"):
        return
    if at("lora.target_modules") is not None or at("lora.target_parameters") is not None:
        return
    vision, language, attention, mlp = (at(f"lora.{name}") is not False for name in _TOGGLES)
    for on, name, other in (
        (vision or language, "finetune_language_layers", "finetune_vision_layers"),
        (attention or mlp, "finetune_attention_modules", "finetune_mlp_modules"),
    ):
        if not on:
            yield finding(
                f"lora.{name}",
                f"must be true if {other} is false: nothing would be trained",
                "set one of them to true",
            )


def _targets_exclude_toggles(at: View) -> Iterator[Finding]:
    if at("lora.method") == "lora" and at("lora.target_modules") is not None:
        for name in _TOGGLES:
            if at(f"lora.{name}") is False:
                yield finding(
                    f"lora.{name}",
                    "does not apply if lora.target_modules names the modules",
                    "remove one of the two",
                )


def _targets_are_linear_modules(at: View) -> Iterator[Finding]:
    """Rejects targets that cannot be linear modules."""
    wanted = at("lora.target_modules")
    if at("lora.method") != "lora" or wanted is None:
        return
    if isinstance(wanted, str):
        yield from _expression_is_valid(wanted)
        return
    for name in wanted:
        if name in (ALL_LINEAR, "all", "all_linear"):
            yield finding(
                "lora.target_modules",
                f"{name} must be the only target: it selects every linear module",
                f"write target_modules: {ALL_LINEAR}",
            )
        elif name.rpartition(".")[2] in _EMBEDDINGS:
            yield finding(
                "lora.target_modules",
                f"{name} is an embedding; this version adapts only linear modules",
                f"leave {name} out",
            )


def _expression_is_valid(wanted: str) -> Iterator[Finding]:
    dotted = "lora.target_modules"
    if wanted == ALL_LINEAR:
        return
    if wanted in ("all", "all_linear"):
        yield finding(dotted, "is not PEFT's name for all linear modules", f"write {ALL_LINEAR}")
    elif re.fullmatch(r"\w+(\s*,\s*\w+)+", wanted):
        names = ", ".join(re.findall(r"\w+", wanted))
        yield finding(dotted, "must be a list to name several modules", f"write [{names}]")
    elif wanted in (*_EMBEDDINGS, *_USUAL):
        yield finding(
            dotted,
            "is a regular expression for full names, and no module has this full name",
            f"write [{wanted}]"
            if wanted in _USUAL
            else "remove the line: embeddings are not adapted",
        )
    else:
        try:
            re.compile(wanted)
        except re.error as error:
            yield finding(
                dotted,
                f"is not a regular expression: {error}",
                r"for example '.*\.(q|v)_proj', or a list of names: [q_proj, v_proj]",
            )


def _experts_are_selected_once(at: View) -> Iterator[Finding]:
    if at("lora.finetune_experts") and at("lora.target_parameters") is not None:
        yield finding(
            "lora.target_parameters",
            "cannot be combined with finetune_experts, which selects the family's parameters",
            "remove one of the two",
        )


def _parameters_require_plain_lora(at: View) -> Iterator[Finding]:
    if not at("lora.finetune_experts") and at("lora.target_parameters") is None:
        return
    which = "finetune_experts" if at("lora.finetune_experts") else "target_parameters"
    for name, plain in (("use_dora", False), ("lora_dropout", 0)):
        if at(f"lora.{name}") != plain:
            yield finding(
                f"lora.{name}",
                f"must be {quoted(plain)} with {which}: PEFT does not support it for parameters",
                f"remove the line, or remove {which}",
            )


def _vllm_requires_its_layout(at: View) -> Iterator[Finding]:
    if at("export.verify") != "vllm":
        return
    for name, needed in (("enabled", True), ("layout", "vllm")):
        if at(f"export.merged.{name}") != needed:
            yield finding(
                f"export.merged.{name}",
                f"must be {quoted(needed)} if export.verify is vllm, which serves it",
                "remove the line, or set export.verify: reload",
            )


RULES: tuple[Rule, ...] = (
    _full_excludes_lora_keys,
    _full_requires_merged,
    _something_is_trained,
    _targets_exclude_toggles,
    _targets_are_linear_modules,
    _experts_are_selected_once,
    _parameters_require_plain_lora,
    _vllm_requires_its_layout,
)
