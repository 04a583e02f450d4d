"""The reference says of every key what the schema says, and what it says of two keys is so."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from job.errors import SpecError, UsageError
from job.spec import keys
from job.spec.load import load_spec
from job.spec.reference import page, reference
from tests.jobs import ROOT


def _fix(field: str) -> str | None:
    with pytest.raises(UsageError) as caught:
        reference(field)
    assert (caught.value.exit_code, caught.value.problems[0].value) == (2, field)
    return caught.value.problems[0].fix


def test_a_key_is_shown_with_what_it_takes_its_default_meaning_and_example() -> None:
    assert reference("train.max_steps") == (
        "train.max_steps\n"
        "    a whole number of at least -1; default -1; since 0.1.0\n"
        "    Optimizer steps to take; -1 leaves it to num_train_epochs. With the section "
        "reinforce, 0\n    trains nothing before it.\n"
        "    example: max_steps: 60"
    )


def test_values_are_written_as_a_spec_has_them() -> None:
    assert not re.search(r"\b(True|False|None)\b", page() + reference())


def test_a_required_key_says_so() -> None:
    assert "\n    text; required; since 0.1.0\n" in reference("output.uri")


def test_the_whole_reference_has_every_key_once_in_order() -> None:
    heads = [line for line in reference().splitlines() if line and not line.startswith(" ")]
    assert heads == list(keys.dotted_keys())


def test_every_description_is_there() -> None:
    words = " ".join(reference().split())
    missing = [path for path, node in keys.walk() if node["description"] not in words]
    assert missing == []


def test_lines_fit_a_terminal() -> None:
    long = [line for line in reference().splitlines() if len(line) > 100]
    assert long == []


def test_a_section_is_shown_with_its_keys() -> None:
    heads = [line for line in reference("output").splitlines() if not line.startswith(" ")]
    assert [head for head in heads if head] == ["output", "output.uri"]


def test_a_last_name_is_enough() -> None:
    assert reference("neftune_noise_alpha") == reference("train.neftune_noise_alpha")
    assert reference("$.train.learning_rate") == reference("train.learning_rate")
    assert reference("dtype") == "\n\n".join(
        [reference("model.dtype"), reference("export.merged.dtype")]
    )


@pytest.mark.parametrize(
    ("field", "fix"),
    [
        ("train.learning_rat", "try train.learning_rate"),
        ("learning_rat", "try train.learning_rate"),
        ("lr", "try train.learning_rate"),
        ("zzzzzz", "try one of version, name, model, data, lora, train, reinforce, eval, export, "),
    ],
)
def test_an_unknown_field_names_the_nearest(field: str, fix: str) -> None:
    found = _fix(field)
    assert found is not None
    assert found.startswith(fix)


def test_the_page_of_the_documentation_is_what_the_schema_says() -> None:
    assert (ROOT / "docs" / "16-reference.md").read_text(
        encoding="utf-8"
    ).rstrip() == page().rstrip()


def test_the_page_has_a_heading_for_every_key() -> None:
    heads = [line.split()[1] for line in page().splitlines() if line.startswith(("## ", "### "))]
    assert heads == list(keys.dotted_keys())


# --- what the reference says of two keys together -------------------------------------------

MINIMAL: dict[str, Any] = {
    "version": 1,
    "name": "x",
    "model": {"model_name_or_path": "models/ernie"},
    "data": {"train": {"uri": "rows.jsonl"}},
    "output": {"uri": "out"},
}
OTHERS: dict[Any, Any] = {
    "hf://org/repo": "models/ernie",
    "builtin://formulas": "rows.jsonl",
    "vllm": "transformers",
    "steps": "no",
    "epoch": "no",
    "validation.jsonl": None,
    0.05: 0,
    3: None,
}
"""In place of what is required, for keys that are not true or false."""


def relations(word: str) -> Iterator[Any]:
    """Each note of the schema: the key, the other key with its value, and a value of the first."""
    for path, node in keys.walk():
        dotted = ".".join(map(str, path))
        for note in node.get(word, ()):
            own = note.get("value", unlike_default(node))
            for each in (note["with"], *note.get("or", ())):
                name, value = each.split(": ", 1)
                other = name if "." in name else ".".join([*map(str, path[:-1]), name])
                label = f"{dotted}, {other}"
                yield pytest.param(dotted, own, other, yaml.safe_load(value), id=label)


def choices() -> Iterator[Any]:
    """Each note of what is required, if that is a choice: the key, a value of it, the other key,
    and all of that one's values that are named."""
    for path, node in keys.walk():
        for note in node.get("requires", ()):
            others = [each.split(": ", 1) for each in (note["with"], *note.get("or", ()))]
            other = others[0][0]
            if "." in other and "enum" in (keys.at(keys.path_of(other)) or {}):
                named = {value for name, value in others if name == other}
                dotted = ".".join(map(str, path))
                own = note.get("value", unlike_default(node))
                yield pytest.param(dotted, own, other, named, id=f"{dotted}, {other}")


def unlike_default(node: keys.Schema) -> Any:
    """A value that the key can hold and that is not its default."""
    if "object" in keys.types(node):
        return node.get("examples", [{"seed": 7}])[0]
    if keys.types(node) == ("boolean",):
        return not node["default"]
    found = [*node.get("examples", ()), *node.get("enum", ())]
    return next((v for v in found if v != node.get("default")), node.get("minimum"))


def refused(settings: dict[str, Any]) -> set[str]:
    """The keys with a problem in a minimal spec with these settings."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    if any(key.startswith("data.eval.") for key in settings):
        overrides.insert(0, "data.eval.uri=held-out.jsonl")
    if any(key.startswith("reinforce.") for key in settings):
        overrides.insert(0, "reinforce.rewards.name=exact_match")
    try:
        load_spec(yaml.safe_dump(MINIMAL), "x", overrides, {})
    except SpecError as error:
        return {problem.key or "" for problem in error.problems}
    return set()


@pytest.mark.parametrize(("key", "value", "other", "with_"), relations("conflicts"))
def test_keys_that_conflict_are_refused_together(
    key: str, value: Any, other: str, with_: Any
) -> None:
    assert {key, other} & refused({key: value, other: with_})


@pytest.mark.parametrize(("key", "value", "other", "with_"), relations("requires"))
def test_a_key_is_refused_without_what_it_requires(
    key: str, value: Any, other: str, with_: Any
) -> None:
    without = not with_ if isinstance(with_, bool) else OTHERS[with_]
    assert any(found.startswith((key, other)) for found in refused({key: value, other: without}))


@pytest.mark.parametrize(("key", "value", "other", "with_"), relations("requires"))
def test_a_key_is_taken_with_what_it_requires(key: str, value: Any, other: str, with_: Any) -> None:
    found = refused({key: value, other: with_})
    assert not any(name == key or name.startswith(f"{key}.") for name in found)


@pytest.mark.parametrize(("key", "value", "other", "named"), choices())
def test_of_a_choice_every_value_that_suffices_is_named(
    key: str, value: Any, other: str, named: set[str]
) -> None:
    node = keys.at(keys.path_of(other))
    assert node is not None
    rows = {"data.validation_fraction": 0.05} if other.endswith("eval_strategy") else {}
    settings = [{**rows, key: value, other: each} for each in node["enum"]]
    assert {each[other] for each in settings if not {key, other} & refused(each)} == named


def test_a_requirement_that_any_value_meets_is_shown_without_a_value() -> None:
    assert "requires: train.early_stopping_patience\n" in reference("early_stopping_threshold")
    shown = reference("train.load_best_model_at_end")
    assert "requires: train.eval_strategy: steps or epoch, for true" in shown


def test_a_problem_of_a_spec_names_its_entry() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(
            yaml.safe_dump(MINIMAL), "x", ["lora.r=0", "eval.metrics=[ber]", "train.lr=1"], {}
        )
    assert [problem.key for problem in caught.value.problems] == ["lora.r", "train", "eval.metrics"]
    assert "\n    see: python -m job reference lora.r" in str(caught.value)
    for problem in caught.value.problems:
        assert problem.key is not None
        assert reference(problem.key).startswith(problem.key)
