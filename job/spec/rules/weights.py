"""Which weights are trained: what of `lora` makes no sense together."""

from collections.abc import Iterator

from job.spec import keys
from job.spec.finding import Finding
from job.spec.names import quoted
from job.spec.rules.view import Rule, View, find

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
    _experts_are_named_once,
    _parameters_take_plain_lora,
    _vllm_reads_its_layout,
)
