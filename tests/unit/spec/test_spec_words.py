"""Words of other tools are answered with what is true of them here, and can be obeyed."""

import dataclasses
import json
from typing import Any

import pytest
import yaml

from job.errors import SpecError
from job.spec import keys
from job.spec.foreign_names import (
    FOREIGN_NAMES_FILE,
    ForeignName,
    fix_for_unknown_key,
    foreign_name,
    foreign_names,
    typo,
)
from job.spec.load import load_spec
from job.spec.validate import _VALUES

BASE: dict[str, Any] = {
    "version": 1,
    "name": "test",
    "model": {"model_name_or_path": "models/base"},
    "data": {"train": [{"uri": "a.jsonl"}]},
    "output": {"uri": "out"},
}
ENTRIES: list[dict[str, Any]] = json.loads(FOREIGN_NAMES_FILE.read_text(encoding="utf-8"))
# What the keys that a word leads to need beside them, to be read at all.
STEPS: dict[str, Any] = {"train.eval_strategy": "steps"}
VALIDATED: dict[str, Any] = {**STEPS, "data.validation_fraction": 0.05}
WITH: dict[str, dict[str, Any]] = {
    "data.validation.uri": STEPS,
    "data.validation_fraction": STEPS,
    "eval.validation_samples": VALIDATED,
    "train.eval_strategy": VALIDATED,
    "train.eval_steps": VALIDATED,
    "train.predict_with_generate": VALIDATED,
    "train.early_stopping_patience": VALIDATED,
    "eval.generation.temperature": {"eval.generation.do_sample": True},
    "data.shuffle_buffer_size": {"data.streaming": True},
    "data.stopping_strategy": {
        "data.train": [{"uri": "a", "weight": 1}, {"uri": "b", "weight": 2}]
    },
    "data.train.weight": {"data.train": [{"uri": "a", "weight": 1}, {"uri": "b", "weight": 2}]},
    "model.revision": {"model.model_name_or_path": "hf://org/repo"},
    "lora.target_parameters": {"lora.lora_dropout": 0},
}
SECTIONS = {"columns": ("data", "train", "columns"), "generation": ("eval", "generation")}
NOT_ALONE = ("data.train.weight",)


def _load(settings: dict[str, Any]) -> dict[str, Any]:
    """The resolved spec with the settings, as a file would hold them. Raises SpecError."""
    spec: Any = yaml.safe_load(yaml.safe_dump(BASE))
    for dotted, value in settings.items():
        place, *rest = dotted.split(".")
        node = spec
        for part in rest:
            if isinstance(node.get(place), list):
                node = node[place][0]
            else:
                node = node.setdefault(place, {})
            place = part
        node[place] = value
    return load_spec(yaml.safe_dump(spec), "job.yaml", environ={}).resolved


def _at(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = (values[0] if isinstance(values, list) else values)[part]
    return values


def _sample(dotted: str, example: Any) -> Any:
    node = keys.at(keys.path_of(dotted))
    assert node is not None
    if example is not None:
        return example
    if "enum" in node or node["type"] == "boolean":
        return node["default"]
    return node["examples"][0] if "examples" in node else node.get("default")


def _title(entry: dict[str, Any]) -> str:
    return str(entry["names"][0])


@pytest.mark.parametrize("entry", ENTRIES, ids=_title)
def test_obeying_a_word_s_answer_gives_a_spec_that_is_valid_and_means_it(
    entry: dict[str, Any],
) -> None:
    said = ForeignName(**{k: v for k, v in entry.items() if k not in ("names", "in")})
    assert sum(each is not None for each in (said.key, said.set, said.none)) == 1
    if said.none is not None:
        return  # what is removed leaves the spec that it was: BASE
    if said.key is not None:
        dotted, value = said.key, _sample(said.key, said.example)
    else:
        assert said.set is not None
        dotted, _, text = said.set.partition(": ")
        value = yaml.safe_load(text)
        value = "on" if text == "on" else value  # YAML 1.1 would read a boolean
    settings = dict(WITH.get(dotted, {}))
    if dotted not in NOT_ALONE:
        settings[dotted] = value
    assert _at(_load(settings), dotted) is not None


@pytest.mark.parametrize("entry", ENTRIES, ids=_title)
def test_a_word_is_answered_by_its_entry_in_every_section(entry: dict[str, Any]) -> None:
    for name in entry["names"]:
        for section in (entry["in"],) if "in" in entry else ("train", "lora", "model"):
            path = SECTIONS.get(section, (section,))
            if keys.at((*path, name)) is not None:
                continue  # the section's own key
            found = (
                foreign_names()[section, _plain(name)] if ("in" in entry) else foreign_name(name)
            )
            told = fix_for_unknown_key((*path, name), value=True)
            assert found is not None
            if "none" in entry:
                assert told == f"remove it: {entry['none']}"
            elif "key" in entry:
                leaf = entry["key"].rpartition(".")[2]
                assert leaf in told or entry["key"] in told, told
            else:
                assert entry.get("text", entry["set"]) in told, told


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def test_no_word_stands_in_two_entries() -> None:
    every = [(entry.get("in"), _plain(name)) for entry in ENTRIES for name in entry["names"]]
    assert len(every) == len(set(every)) == len(foreign_names())
    assert len(every) > 800


def test_a_word_that_turns_something_off_leads_to_no_key_that_turns_it_on() -> None:
    for entry in ENTRIES:
        if "set" in entry:
            values: tuple[Any, ...] = (False, None, "", [])
            for off in values:
                told = fix_for_unknown_key(("train", entry["names"][0]), off)
                assert told == "remove it: nothing needs to be turned off"


# --- the configurations of libraries, whole -------------------------------------------------


def _fields(configuration: str) -> list[str]:
    if configuration == "LoraConfig":
        peft = pytest.importorskip("peft")
        return [field.name for field in dataclasses.fields(peft.LoraConfig)]
    if configuration == "TrainingArguments":
        import transformers

        return [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
    trl = pytest.importorskip("trl")
    return [field.name for field in dataclasses.fields(getattr(trl, configuration))]


@pytest.mark.parametrize(
    ("configuration", "section"),
    [
        ("LoraConfig", "lora"),
        ("TrainingArguments", "train"),
        ("SFTConfig", "train"),
        ("GRPOConfig", "reinforce"),
    ],
)
def test_every_field_is_a_key_of_that_name_or_a_word_with_an_answer(
    configuration: str, section: str
) -> None:
    leaves = {dotted.rpartition(".")[2] for dotted in keys.dotted_keys()}
    unanswered = [
        name
        for name in _fields(configuration)
        if keys.at((section, name)) is None
        and foreign_name(name, (section,)) is None
        # the same key, in another section
        and name not in leaves
    ]
    assert unanswered == []


# --- slips of the finger --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "known"),
    [
        ("learning_rat", "learning_rate"),
        ("learning_rtae", "learning_rate"),
        ("Learning-Rate", "learning_rate"),
        ("max_step", "max_steps"),
        ("savesteps", "save_steps"),
        ("outptu", "output"),
    ],
)
def test_a_slip_of_the_finger_is_seen(typed: str, known: str) -> None:
    assert typo(typed, ["learning_rate", "max_steps", "save_steps", "output"]) == known


@pytest.mark.parametrize(
    ("typed", "known"),
    [
        ("eval_steps", ["max_steps", "save_steps", "logging_steps"]),
        ("adam_beta3", ["adam_beta1", "adam_beta2"]),
        ("top_p", ["min_p"]),
        ("wer", ["cer"]),
        ("cosine_with_min_lr", ["cosine_with_restarts", "cosine"]),
        ("paged_adamw_32bit", ["paged_adamw_8bit"]),
        ("eval_fraction_rows", ["eval_fraction"]),
    ],
)
def test_a_name_that_is_merely_like_another_is_not_taken_for_it(
    typed: str, known: list[str]
) -> None:
    assert typo(typed, known) is None


@pytest.mark.parametrize("dotted", [key for key in keys.dotted_keys() if ".formulas" not in key])
def test_a_key_with_a_letter_missing_leads_to_itself(dotted: str) -> None:
    *section, leaf = dotted.split(".")
    if len(leaf) < 5:
        return
    typed = leaf[:2] + leaf[3:]
    if foreign_name(typed, tuple(section)) is None:
        assert fix_for_unknown_key((*section, typed), "x") == f"write {leaf}"


# --- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotted", "typed"),
    [(dotted, typed) for dotted, each in _VALUES.items() for typed in each if dotted],
)
def test_obeying_what_is_said_of_a_value_gives_a_valid_spec(dotted: str, typed: str) -> None:
    given: Any = [typed] if keys.types(keys.at(keys.path_of(dotted)) or {}) == ("array",) else typed
    with pytest.raises(SpecError) as caught:
        _load({dotted: typed})
    (problem,) = caught.value.problems
    assert problem.fix is not None, given
    meant = problem.fix.removeprefix("write ").split(",")[0].split(":")[0]
    _load({dotted: yaml.safe_load(meant)})


@pytest.mark.parametrize(
    ("dotted", "value", "fix"),
    [
        ("model", "Qwen/Qwen2.5-VL", "write it as model.model_name_or_path"),
        ("data", "rows.jsonl", "write it as data.train.uri"),
        ("output", "out", "write it as output.uri"),
        ("train.report_to", "wandb, tensorboard", "write [wandb, tensorboard]"),
        ("train.report_to", "all", "the default is []"),
        ("eval.metrics", "wer", None),
        ("train.learning_rate", 2e5, "the default is 0.0002"),
        ("train.learning_rate", 1, "the default is 0.0002"),
        ("lora.lora_dropout", 1, "the default is 0"),
        ("lora.r", 100000, "the default is 8"),
        ("lora.lora_alpha", 10**6, "the default is 16"),
        ("train.max_length", 10**9, "the default is 2048"),
        ("train.per_device_train_batch_size", 10**6, "the default is 2"),
    ],
)
def test_a_value_that_is_certainly_a_mistake_is_refused(
    dotted: str, value: Any, fix: str | None
) -> None:
    with pytest.raises(SpecError) as caught:
        _load({dotted: value})
    (problem,) = caught.value.problems
    assert problem.fix == fix or (fix is None and "cer" not in str(problem.fix)[:12])


@pytest.mark.parametrize("name", ["max_length", "max_tokens", "min_length"])
def test_a_bound_on_answers_never_becomes_one_on_the_rows_that_train(name: str) -> None:
    told = fix_for_unknown_key(("eval", "generation", name), value=20)
    assert "max_new_tokens" in told
    assert not told.startswith("move it")
