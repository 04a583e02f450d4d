"""`--set` puts values in by dotted key."""

import pytest

from job.errors import SpecError, UsageError
from job.spec.load import load_spec
from job.spec.overrides import KeyValue, Override, override
from job.spec.parse import parse
from job.spec.types import JobSpec

MINIMAL = """
version: 1
name: sample
model: {model_name_or_path: models/base}
data: {train: {uri: data/train.jsonl}, eval: }
output: {uri: outputs/sample}
train:
  seed: 1
  report_to: [wandb]
"""


def _spec(*overrides: Override, **environ: str) -> JobSpec:
    return load_spec(MINIMAL, "job.yaml", overrides, environ).spec


def _error(*overrides: Override) -> str:
    with pytest.raises(SpecError) as caught:
        _spec(*overrides)
    return str(caught.value)


def test_values_are_read_as_yaml() -> None:
    spec = _spec(
        "train.learning_rate=1e-3",
        "train.seed=7",
        "lora.target_modules=[q_proj, v_proj]",
        "lora.use_dora=true",
        "runtime.workdir=null",
        "export.merged={enabled: false}",
    )
    assert (spec.train.learning_rate, spec.train.seed) == (1e-3, 7)
    assert spec.lora.target_modules == ("q_proj", "v_proj")
    assert spec.lora.use_dora is True
    assert spec.runtime.workdir is None
    assert spec.export.merged.enabled is False


def test_text_is_taken_as_it_is() -> None:
    spec = _spec("data.instruction=Write: the formula # exactly", "output.uri=s3://b/k=v")
    assert spec.data.instruction == "Write: the formula # exactly"
    assert spec.output.uri == "s3://b/k=v"


def test_a_number_for_a_key_of_text_is_text() -> None:
    assert _spec("name=123").name == "123"


def test_the_last_of_several_wins() -> None:
    assert _spec("train.seed=2", "train.seed=3").train.seed == 3


def test_an_option_of_a_key_s_own_is_named_in_place_of_a_set_that_nobody_wrote() -> None:
    wrong = KeyValue("--temperature", "eval.generation.temperature", "0")
    assert _error(wrong).startswith("--temperature: must be a number greater than 0")
    both = _error("train.seed=x", KeyValue("--temperature", "eval.generation.temperature", "[1"))
    assert "--set $.train.seed: " in both
    assert "--temperature: value is not valid YAML" in both


def test_a_path_copied_from_a_message_works() -> None:
    assert _spec("$.train.seed=2").train.seed == 2


def test_an_item_of_a_list_is_reached_by_its_number() -> None:
    spec = _spec("data.train=[{uri: a}, {uri: b}]", "$.data.train[1].limit=5")
    assert [source.limit for source in spec.data.train] == [None, 5]


def test_variables_are_replaced() -> None:
    assert _spec("train.seed=${SEED}", SEED="9").train.seed == 9


def test_an_overridden_variable_need_not_be_set() -> None:
    text = MINIMAL.replace("seed: 1", "seed: ${SEED}")
    assert load_spec(text, "job.yaml", ["train.seed=4"], {}).spec.train.seed == 4


def test_a_list_that_is_replaced_leaves_nothing_of_the_old_one() -> None:
    text = MINIMAL.replace("[wandb]", "['${MISSING}']")
    assert load_spec(text, "job.yaml", ["train.report_to=[]"], {}).spec.train.report_to == ()


def test_a_section_that_is_null_is_built() -> None:
    spec = _spec("data.eval.uri=data/eval.jsonl", "data.eval.limit=5")
    assert spec.data.eval is not None
    assert (spec.data.eval.uri, spec.data.eval.limit) == ("data/eval.jsonl", 5)


def test_a_section_that_is_built_without_what_it_needs_is_told() -> None:
    assert _error("data.eval.limit=5").startswith("job.yaml:5 $.data.eval.uri: is missing\n")


def test_the_document_is_not_changed() -> None:
    document = parse(MINIMAL, "job.yaml")
    override(document, ["train.seed=5"])
    assert document.values["train"]["seed"] == 1


@pytest.mark.parametrize("item", ["train.seed", "", "output.uri:x"])
def test_an_override_without_equals_is_a_usage_error(item: str) -> None:
    with pytest.raises(UsageError) as caught:
        _spec(item)
    assert caught.value.exit_code == 2
    assert caught.value.problems[0].message == "must be KEY=VALUE"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.sed=1", "--set $.train.sed: is not a known key (found 1)\n    fix: write seed"),
        ("trian.seed=1", '--set $.trian: is not a known key (found {"seed": 1})\n    fix: write '),
        ("lr=1", "--set $.lr: is not a known key (found 1)\n    fix: move it to train.learning_ra"),
        (
            "train.seed.x=1",
            "--set $.train.seed.x: has no keys in train.seed, which is 1 (found train.seed.x=1)",
        ),
        (
            "train.report_to.0=mlflow",
            '--set $.train.report_to["0"]: must name an item of the list in brackets, as in '
            "train.report_to[0] (found train.report_to.0=mlflow)",
        ),
        (
            "train.report_to[1]=mlflow",
            "--set $.train.report_to[1]: has no item 1 in train.report_to, which is a list of 1",
        ),
        ("train.seed[0]=1", "--set $.train.seed[0]: has no item 0 in train.seed, which is 1"),
        ("=1", '--set $[""]: requires a dotted key such as train.max_steps (found =1)'),
        ("a..b=1", '--set $.a[""].b: requires a dotted key such as train.max_steps (found a..b=1)'),
        ("train.seed=[1", "--set $.train.seed: value is not valid YAML: "),
        ("train.seed=x", "--set $.train.seed: must be a whole number of at least 0 and at most"),
        ("train.seed=", "--set $.train.seed: must be a whole number of at least 0 and at most"),
    ],
)
def test_an_override_that_makes_no_sense_is_a_spec_error(item: str, message: str) -> None:
    assert _error(item).startswith(message)


def test_a_key_of_a_list_of_sources_asks_which_one() -> None:
    error = _error("data.train=[{uri: a}, {uri: b}]", "data.train.limit=5")
    assert "must name an item of the list, as in data.train[0].limit" in error
    error = _error("data.train=[{uri: a}, {uri: b}]", "data.train.1.limit=5")
    assert "must name an item of the list in brackets, as in data.train[1].limit" in error
    error = _error("reinforce.rewards=[{name: length}]", "reinforce.rewards.0.name=exact_match")
    assert "must name an item of the list in brackets, as in reinforce.rewards[0].name" in error


def test_every_override_that_makes_no_sense_is_told_at_once() -> None:
    message = _error("a..b=1", "train.seed.x=1", "nmae=x", "train.max_steps=0")
    assert message.count("--set $") == 4
