"""Checks of a base in 4 bits: what else may be set."""

from collections.abc import Iterator

from job.spec import keys
from job.spec.foreign_names import quoted
from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, finding

_EXCLUDED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("lora.method", ("full",), "weights in 4 bits are frozen: write lora"),
    ("lora.bias", ("all", "lora_only"), "the model's own weights are frozen: write none"),
    ("model.init", ("random",), "the merge reads the original weights again: write pretrained"),
    (
        "model.engine",
        ("unsloth",),
        "unsloth loads none in this version: write transformers",
    ),
    ("runtime.distributed", ("fsdp2",), "they are not sharded in this version: write ddp"),
    ("train.torch_compile", (True,), "they are unpacked outside of compiled code: write false"),
)
"""Values that exclude a base in 4 bits, and why."""


def _four_bit_excludes(at: View) -> Iterator[Finding]:
    if not at("model.load_in_4bit"):
        return
    for dotted, values, reason in _EXCLUDED:
        value = at(dotted)
        if value in values:
            why, _, fix = reason.partition(": ")
            yield finding(
                dotted,
                f"must not be {quoted(value)} if model.load_in_4bit is true: {why}",
                f"{fix}, or set model.load_in_4bit: false",
            )


def _options_require_four_bit(at: View) -> Iterator[Finding]:
    for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if not at("model.load_in_4bit") and at(f"model.{name}") != keys.default(f"model.{name}"):
            yield finding(
                f"model.{name}",
                "requires model.load_in_4bit: true",
                "remove the line, or set model.load_in_4bit: true",
            )


RULES: tuple[Rule, ...] = (_four_bit_excludes, _options_require_four_bit)
