"""Checks of the adapter that a training continues from, and of keys that part an adapter."""

import re
from collections.abc import Iterator

from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, finding
from job.spec.rules.weights import ALL_LINEAR

PATTERNS = ("rank_pattern", "alpha_pattern")


def _start_adapter_is_an_adapter(at: View) -> Iterator[Finding]:
    uri = at("model.adapter_name_or_path")
    if uri is None:
        return
    if at("lora.method") == "full":
        yield finding(
            "model.adapter_name_or_path",
            "requires lora.method: lora, which continues the adapter",
            "set lora.method: lora; or, to train every weight, merge the adapter first and name "
            "the merged/ of its run as model.model_name_or_path",
        )
    if uri.startswith("builtin://"):
        yield finding(
            "model.adapter_name_or_path", "no adapter ships with the project", "write its URI"
        )
    elif uri.rstrip("/") == at("model.model_name_or_path").rstrip("/"):
        yield finding(
            "model.adapter_name_or_path",
            "is also model.model_name_or_path, but an adapter needs its base model",
            "name the base model as model.model_name_or_path",
        )


def _layers_are_chosen_once(at: View) -> Iterator[Finding]:
    targets = at("lora.target_modules")
    if at("lora.method") != "lora" or at("lora.layers_to_transform") is None:
        return
    if isinstance(targets, str) and targets != ALL_LINEAR:
        yield finding(
            "lora.layers_to_transform",
            "cannot be combined with a regular expression in target_modules, as in PEFT",
            r"name the layers in the expression, like '.*\.layers\.(0|1)\..*q_proj', or write "
            "target_modules as a list of names",
        )


def _patterns_are_expressions(at: View) -> Iterator[Finding]:
    for name in PATTERNS:
        for pattern in at(f"lora.{name}"):
            try:
                re.compile(pattern)
            except re.error as error:
                yield finding(
                    f"lora.{name}",
                    f"{pattern!r} is not a regular expression: {error}",
                    r"for example {o_proj: 16}, or {'layers\.[0-3]\..*': 16}",
                )


def _fsdp2_excludes_saved_modules(at: View) -> Iterator[Finding]:
    if at("runtime.distributed") == "fsdp2" and at("lora.modules_to_save") is not None:
        yield finding(
            "lora.modules_to_save",
            "does not apply if runtime.distributed is fsdp2: this version shards only layers with "
            "frozen weights",
            "remove the line, or set runtime.distributed: ddp",
        )


def _unsloth_trains_plain_adapters(at: View) -> Iterator[Finding]:
    if at("model.engine") != "unsloth":
        return
    for name in ("modules_to_save", "finetune_experts", *PATTERNS):
        if at(f"lora.{name}"):
            yield finding(
                f"lora.{name}",
                "does not apply if model.engine is unsloth, which trains adapters of one rank only "
                "in this version",
                "remove the line, or set model.engine: transformers",
            )


RULES: tuple[Rule, ...] = (
    _start_adapter_is_an_adapter,
    _layers_are_chosen_once,
    _patterns_are_expressions,
    _fsdp2_excludes_saved_modules,
    _unsloth_trains_plain_adapters,
)
