"""Which weights are trained: what of `lora` makes no sense together."""

import re
from collections.abc import Iterator

from job.spec import keys
from job.spec.foreign_names import quoted
from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, find

ALL_LINEAR = "all-linear"
"""Every linear module but the output's, as PEFT has the word."""
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_positions")
_USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
_TOGGLES = (
    "finetune_vision_layers",
    "finetune_language_layers",
    "finetune_attention_modules",
    "finetune_mlp_modules",
)


def _full_reads_no_lora_key(at: View) -> Iterator[Finding]:
    if at("lora.method") != "full":
        return
    for name, value in at("lora").items():
        if name != "method" and value != keys.default(f"lora.{name}"):
            yield find(
                f"lora.{name}",
                "is not read where lora.method is full, which trains every weight",
                "remove the line, or set lora.method: lora",
            )


def _full_needs_merged(at: View) -> Iterator[Finding]:
    if at("lora.method") == "full" and not at("export.merged.enabled"):
        yield find(
            "export.merged.enabled",
            "must be true where lora.method is full: nothing else would be exported",
            "set export.merged.enabled: true",
        )


def _something_is_adapted(at: View) -> Iterator[Finding]:
    if at("lora.method") != "lora" or at("lora.finetune_experts"):
        return
    if at("lora.target_modules") is not None or at("lora.target_parameters") is not None:
        return
    vision, language, attention, mlp = (at(f"lora.{name}") for name in _TOGGLES)
    for on, name, other in (
        (vision or language, "finetune_language_layers", "finetune_vision_layers"),
        (attention or mlp, "finetune_attention_modules", "finetune_mlp_modules"),
    ):
        if not on:
            yield find(
                f"lora.{name}",
                f"must be true where {other} is false: nothing would be trained",
                "set one of them to true",
            )


def _targets_replace_toggles(at: View) -> Iterator[Finding]:
    if at("lora.method") == "lora" and at("lora.target_modules") is not None:
        for name in _TOGGLES:
            if not at(f"lora.{name}"):
                yield find(
                    f"lora.{name}",
                    "is not read where lora.target_modules names the modules",
                    "remove one of the two",
                )


def _targets_can_be_names(at: View) -> Iterator[Finding]:
    """What no model has a linear module for, whatever its family."""
    wanted = at("lora.target_modules")
    if at("lora.method") != "lora" or wanted is None:
        return
    if isinstance(wanted, str):
        yield from _one_expression(wanted)
        return
    for name in wanted:
        if name in (ALL_LINEAR, "all", "all_linear"):
            yield find(
                "lora.target_modules",
                f"{name} stands alone: it is every linear module already",
                f"write target_modules: {ALL_LINEAR}",
            )
        elif name.rpartition(".")[2] in _EMBEDDINGS:
            yield find(
                "lora.target_modules",
                f"{name} is a table of embeddings; this version adapts linear modules alone",
                f"leave {name} out",
            )


def _one_expression(wanted: str) -> Iterator[Finding]:
    dotted = "lora.target_modules"
    if wanted == ALL_LINEAR:
        return
    if wanted in ("all", "all_linear"):
        yield find(dotted, "is not the word for every linear module", f"write {ALL_LINEAR}")
    elif re.fullmatch(r"\w+(\s*,\s*\w+)+", wanted):
        names = ", ".join(re.findall(r"\w+", wanted))
        yield find(dotted, "must be a list where it has several names", f"write [{names}]")
    elif wanted in (*_EMBEDDINGS, *_USUAL):
        yield find(
            dotted,
            "is a regular expression for whole names, and no module's whole name is this",
            f"write [{wanted}]" if wanted in _USUAL else "remove the line: embeddings stay as is",
        )
    else:
        try:
            re.compile(wanted)
        except re.error as error:
            yield find(
                dotted,
                f"is not a regular expression: {error}",
                r"for example '.*\.(q|v)_proj', or a list of names: [q_proj, v_proj]",
            )


def _experts_are_named_once(at: View) -> Iterator[Finding]:
    if at("lora.finetune_experts") and at("lora.target_parameters") is not None:
        yield find(
            "lora.target_parameters",
            "cannot stand beside finetune_experts, which names the family's own parameters",
            "remove one of the two",
        )


def _parameters_take_plain_lora(at: View) -> Iterator[Finding]:
    if not at("lora.finetune_experts") and at("lora.target_parameters") is None:
        return
    which = "finetune_experts" if at("lora.finetune_experts") else "target_parameters"
    for name, plain in (("use_dora", False), ("lora_dropout", 0)):
        if at(f"lora.{name}") != plain:
            yield find(
                f"lora.{name}",
                f"must be {quoted(plain)} beside {which}: PEFT adapts bare parameters without it",
                f"remove the line, or remove {which}",
            )


def _vllm_reads_its_layout(at: View) -> Iterator[Finding]:
    if at("export.verify") != "vllm":
        return
    for name, needed in (("enabled", True), ("layout", "vllm")):
        if at(f"export.merged.{name}") != needed:
            yield find(
                f"export.merged.{name}",
                f"must be {quoted(needed)} where export.verify is vllm, which serves that",
                "remove the line, or set export.verify: reload",
            )


RULES: tuple[Rule, ...] = (
    _full_reads_no_lora_key,
    _full_needs_merged,
    _something_is_adapted,
    _targets_replace_toggles,
    _targets_can_be_names,
    _experts_are_named_once,
    _parameters_take_plain_lora,
    _vllm_reads_its_layout,
)
