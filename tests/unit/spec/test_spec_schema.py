"""The schema is complete, says itself what it means, and agrees with the frozen classes."""

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from jsonschema import Draft202012Validator

from job.spec import keys
from job.spec.foreign_names import SECTIONS
from job.spec.resolve import fill
from job.spec.types import JobSpec, Patterns
from job.spec.validate import schema_text

KEYS = {".".join(map(str, path)): node for path, node in keys.walk()}
REQUIRED = {
    "version",
    "name",
    "model",
    "model.model_name_or_path",
    "data",
    "data.train",
    "data.train.uri",
    "data.eval.uri",
    "data.validation.uri",
    "reinforce.rewards",
    "reinforce.rewards.name",
    "output",
    "output.uri",
}


def _dataclass_of(hint: Any) -> Any:
    options = get_args(hint) if get_origin(hint) in (types.UnionType, tuple) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _fields(kind: Any, above: str = "") -> dict[str, Any]:
    """Every field of the frozen classes by dotted name, with its type."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        found[above + name] = hint
        if inner := _dataclass_of(hint):
            found |= _fields(inner, f"{above}{name}.")
    return found


def _json_types(hint: Any) -> set[str]:
    if get_origin(hint) in (types.UnionType, Union):  # the latter of a class and a Literal
        return set().union(*(_json_types(option) for option in get_args(hint)))
    if get_origin(hint) is Literal:
        return set().union(*(_json_types(type(choice)) for choice in get_args(hint)))
    if get_origin(hint) is tuple:
        if _dataclass_of(hint):
            return {"object", "array"}  # one section means a list of one
        if hint == Patterns:
            return {"object"}  # a mapping with free keys, in order
        assert get_args(hint)[0] in (str, int), "other lists hold text or numbers"
        return {"array"}
    if dataclasses.is_dataclass(hint):
        return {"object"}
    return {
        {
            str: "string",
            int: "integer",
            float: "number",
            bool: "boolean",
            type(None): "null",
        }[hint]
    }


def test_schema_is_valid_draft_2020_12_with_identity_title_and_description() -> None:
    schema = keys.schema()
    Draft202012Validator.check_schema(dict(schema))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"$id", "title", "description"} <= schema.keys()


def test_schema_text_is_the_schema() -> None:
    assert schema_text() == keys.SCHEMA_FILE.read_text(encoding="utf-8")


def test_schema_and_dataclasses_have_the_same_keys_in_the_same_order() -> None:
    assert list(KEYS) == list(_fields(JobSpec))


@pytest.mark.parametrize(("dotted", "hint"), _fields(JobSpec).items())
def test_schema_and_dataclass_agree_on_the_type(dotted: str, hint: Any) -> None:
    node = KEYS[dotted]
    assert set(keys.types(node)) == _json_types(hint)
    if get_origin(hint) is Literal:
        allowed = node["enum"] if "enum" in node else [node["const"]]
        assert sorted(allowed) == sorted(get_args(hint))
    if "array" in keys.types(node):
        options = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
        [items] = [option for option in options if get_origin(option) is tuple] or [hint]
        of_items = "integer" if get_args(items) == (int, ...) else "string"
        assert node["items"]["type"] == ("object" if _dataclass_of(hint) else of_items)


@pytest.mark.parametrize(("dotted", "node"), KEYS.items())
def test_every_key_is_described_and_has_a_default_unless_required(dotted: str, node: Any) -> None:
    assert node["description"].endswith("."), "descriptions are sentences"
    assert ("default" in node) != (dotted in REQUIRED)
    if "properties" in node:
        assert node["additionalProperties"] is False


def test_required_keys_are_those_without_a_default() -> None:
    def required(node: Any, above: str) -> set[str]:
        found = {above + name for name in node.get("required", ())}
        for name, inner in node.get("properties", {}).items():
            found |= required(keys.follow(inner), f"{above}{name}.")
        return found

    assert required(keys.schema(), "") == REQUIRED


@pytest.mark.parametrize(("dotted", "node"), KEYS.items())
def test_defaults_and_examples_are_valid_themselves(dotted: str, node: Any) -> None:
    validator = Draft202012Validator({**node, "$defs": keys.schema()["$defs"]})
    for value in [*([node["default"]] if "default" in node else []), *node.get("examples", [])]:
        validator.validate(value)


def test_keys_without_choices_or_default_show_an_example() -> None:
    silent = [
        dotted
        for dotted, node in KEYS.items()
        if "examples" not in node
        and "object" not in keys.types(node)
        and "enum" not in node
        and node.get("default") is None
    ]
    assert silent == []


def test_defaults_are_the_reference_workload() -> None:
    sections: dict[str, Any] = fill(
        {"lora": {}, "train": {}, "eval": {}, "export": {}, "runtime": {}}
    )
    assert sections["lora"] == {
        "method": "lora",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "bias": "none",
        "target_modules": None,
        "target_parameters": None,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "finetune_vision_layers": True,
        "finetune_language_layers": True,
        "finetune_attention_modules": None,
        "finetune_mlp_modules": True,
        "finetune_experts": None,
    }
    train = sections["train"]
    assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 4
    assert (train["learning_rate"], train["lr_scheduler_type"]) == (2e-4, "linear")
    assert (train["warmup_steps"], train["max_steps"], train["num_train_epochs"]) == (5, -1, 1)
    assert (train["weight_decay"], train["max_grad_norm"], train["seed"]) == (0.001, 1.0, 3407)
    assert (train["optim"], train["max_length"], train["report_to"]) == ("auto", 2048, [])
    assert sections["eval"]["generation"] == {
        "max_new_tokens": "auto",
        "do_sample": False,
        "temperature": 1.0,
        "min_p": 0.0,
        "enable_thinking": False,
    }
    assert sections["export"]["merged"] == {
        "enabled": True,
        "dtype": "float16",
        "max_shard_size": "5GB",
        "layout": "vllm",
    }


def test_no_other_name_of_a_section_hides_a_key() -> None:
    names = {dotted.rpartition(".")[2] for dotted in KEYS}
    assert not names & {*SECTIONS}
    assert {*SECTIONS.values()} <= {*KEYS}
