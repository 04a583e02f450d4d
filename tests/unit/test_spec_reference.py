"""The reference says of every key what the schema says."""

import pytest

from job.errors import UsageError
from job.spec import keys
from job.spec.reference import reference


def _fix(field: str) -> str | None:
    with pytest.raises(UsageError) as caught:
        reference(field)
    assert (caught.value.exit_code, caught.value.problems[0].value) == (2, field)
    return caught.value.problems[0].fix


def test_a_key_is_shown_with_what_it_takes_its_default_meaning_and_example() -> None:
    assert reference("train.max_steps") == (
        "train.max_steps\n"
        "    a whole number of at least -1; default -1\n"
        "    Optimizer steps to take; -1 leaves it to num_train_epochs.\n"
        "    example: max_steps: 60"
    )


def test_a_required_key_says_so() -> None:
    assert "\n    text; required\n" in reference("output.uri")


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
    assert reference("learning_rate") == reference("train.learning_rate")
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
        ("zzzzzz", "try one of version, name, model, data, lora, train, eval, export, output, "),
    ],
)
def test_an_unknown_field_names_the_nearest(field: str, fix: str) -> None:
    found = _fix(field)
    assert found is not None
    assert found.startswith(fix)
