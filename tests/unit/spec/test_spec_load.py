"""A spec in, a frozen job out; anything else is an error with an exit code of its own."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from job.errors import SpecError, UsageError
from job.spec import keys
from job.spec.load import LoadedSpec, dump_resolved, load_spec

MINIMAL = """
version: 1
name: sample
model: {model_name_or_path: models/base}
data: {train: {uri: data/train.jsonl}}
output: {uri: outputs/sample}
"""
COMPLETE = dump_resolved(
    load_spec(
        MINIMAL,
        "job.yaml",
        [
            "data.eval={uri: 'builtin://formulas', limit: 3}",
            "data.validation={uri: validation.jsonl}",
            "train.eval_strategy=steps",
            "lora.target_modules=[q_proj]",
            "train.report_to=[wandb]",
            "reinforce={rewards: {name: exact_match}}",
        ],
        {},
    )
)
VALUES: dict[str, Any] = yaml.safe_load(COMPLETE)
# YAML is a superset of JSON, so JSON is how a test writes a spec of arbitrary values.
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["${HOME}", "${", "$${x}", "${NO_SUCH,1}", "auto", "builtin://formulas", "yes"]
    )
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


def _load_or_refuse(text: str, overrides: tuple[str, ...] = ()) -> LoadedSpec | None:
    """What a user may see: a job, which loads again as itself, or one of two kinds of error."""
    try:
        loaded = load_spec(text, "job.yaml", overrides, {"HOME": "/home"})
    except (SpecError, UsageError) as error:
        print(error)  # which must not fail either
        return None
    assert load_spec(dump_resolved(loaded), "again.yaml", environ={}) == loaded
    return loaded


def test_defaults_are_filled_in_and_numbers_take_their_types() -> None:
    spec = load_spec(MINIMAL, "job.yaml", ["train.weight_decay=1", "train.seed=1e3"], {}).spec
    assert spec.name == "sample"
    assert spec.data.eval is None
    assert (spec.eval.answer, spec.eval.metrics) == ("text", None)
    texts = ("exact_match", "exact_match_normalized", "cer", "wer", "bleu")
    assert spec.eval.measured == texts
    assert (spec.train.weight_decay, type(spec.train.weight_decay)) == (1.0, float)
    assert (spec.train.seed, type(spec.train.seed)) == (1000, int)
    assert type(spec.train.num_train_epochs) is float


def test_a_loaded_spec_is_frozen_and_can_be_hashed() -> None:
    spec = load_spec(COMPLETE, "job.yaml", environ={}).spec
    assert hash(spec) == hash(load_spec(COMPLETE, "other.yaml", environ={}).spec)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.train.seed = 1  # type: ignore[misc]


def test_every_key_of_the_schema_is_in_the_resolved_spec() -> None:
    def names(values: dict[str, Any], above: str = "") -> list[str]:
        found = []
        for name, value in values.items():
            found.append(above + name)
            if isinstance(value, dict):
                found += names(value, f"{above}{name}.")
        return found

    assert names(load_spec(COMPLETE, "job.yaml", environ={}).resolved) == list(keys.dotted_keys())


def test_changed_are_the_keys_that_differ_from_their_defaults_or_have_none() -> None:
    overrides = ["train.seed=1", "train.save_steps=100", "data.eval={uri: x, limit: 2}"]
    assert load_spec(MINIMAL, "job.yaml", overrides, {}).changed == (
        "version",
        "name",
        "model.model_name_or_path",
        "data.train.uri",
        "data.eval.uri",
        "data.eval.limit",
        "train.seed",
        "output.uri",
    )


def test_a_list_of_sources_is_filled_in_and_changed_one_by_one() -> None:
    sources = "data.train=[{uri: a.jsonl, weight: 1}, {uri: '${B,b}.jsonl', weight: 3, limit: 9}]"
    loaded = load_spec(MINIMAL, "job.yaml", [sources], {})
    assert [(s.uri, s.weight, s.limit) for s in loaded.spec.data.train] == [
        ("a.jsonl", 1, None),
        ("b.jsonl", 3, 9),
    ]
    assert list(loaded.spec.data.sources()) == ["$.data.train[0]", "$.data.train[1]"]
    assert [path for path in loaded.changed if path.startswith("data.")] == [
        *("data.train[0].uri", "data.train[0].weight"),
        *("data.train[1].uri", "data.train[1].limit", "data.train[1].weight"),
    ]
    assert load_spec(dump_resolved(loaded), "again.yaml", environ={}) == loaded
    listed = load_spec(MINIMAL, "job.yaml", ["data.train=[{uri: a}]"], {})
    assert listed.spec == load_spec(MINIMAL, "job.yaml", ["data.train={uri: a}"], {}).spec


@pytest.mark.parametrize(
    "text", ["2e-4", "0x1f", "on", "1:30", "2024-01-01", "null", "a: b", "# x"]
)
def test_text_that_looks_like_something_else_survives_the_resolved_spec(text: str) -> None:
    spec = f"{MINIMAL}runtime: {{cache_dir: {json.dumps(text)}}}"
    loaded = load_spec(spec, "job.yaml", environ={})
    again = load_spec(dump_resolved(loaded), "again.yaml", environ={})
    assert again.spec.runtime.cache_dir == text
    assert yaml.safe_load(dump_resolved(loaded))["runtime"]["cache_dir"] == text


@pytest.mark.parametrize(
    "text", ["a\x85b", "a\u2028b", " a\n b\r\n", "é\n\n", "😀", "\ta", "a\ufeffb"]
)
def test_any_instruction_survives_the_resolved_spec(text: str) -> None:
    spec = MINIMAL.replace("jsonl}}", f"jsonl}}, instruction: {json.dumps(text)}}}")
    loaded = load_spec(spec, "job.yaml", environ={})
    assert loaded.spec.data.instruction == text
    assert load_spec(dump_resolved(loaded), "again.yaml", environ={}) == loaded


def test_the_resolved_spec_means_the_same_to_yaml_1_1() -> None:
    assert load_spec(COMPLETE, "job.yaml", environ={}).resolved == VALUES


def test_a_spec_shares_nothing_with_the_next_one() -> None:
    first = load_spec(MINIMAL, "job.yaml", environ={})
    first.resolved["train"]["report_to"].append("other")
    second = load_spec(MINIMAL, "job.yaml", environ={})
    assert "other" not in second.resolved["train"]["report_to"]


def test_loading_imports_no_framework() -> None:
    script = (
        "import sys; from job.spec.load import load_spec; from job.spec.reference import reference;"
        f"load_spec({MINIMAL!r}, 'job.yaml', environ={{}});"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "numpy", "fsspec", "datasets", "peft", "requests", "rich"}
    assert heavy & set(done.stdout.split()) == set()


@given(path=st.sampled_from([path for path, _ in keys.walk()]), value=anything)
@example(path=("data", "train", "limit"), value="'")
@example(path=("data", "train", "limit"), value="'\x1f0")
@settings(max_examples=150, deadline=None)
def test_any_value_at_any_key_loads_or_is_refused(path: tuple[str, ...], value: Any) -> None:
    values = json.loads(json.dumps(VALUES))
    target = values
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    _load_or_refuse(yaml.safe_dump(values, allow_unicode=True))


@given(
    path=st.sampled_from([path for path, _ in keys.walk()]),
    name=st.text(max_size=12) | st.sampled_from(["lr", "seed", "uri", "<<", "model"]),
    remove=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_any_key_added_or_removed_loads_or_is_refused(
    path: tuple[str, ...], name: str, remove: bool
) -> None:
    values = json.loads(json.dumps(VALUES))
    target = values
    for part in path[:-1]:
        target = target[part]
    value = target.pop(path[-1]) if remove else target[path[-1]]
    target[name] = value
    _load_or_refuse(yaml.safe_dump(values, allow_unicode=True))


@given(
    start=st.integers(0, len(COMPLETE)),
    length=st.integers(0, 30),
    inserted=st.text(max_size=12) | st.text(alphabet="\t\n :-[]{}'\"&*!|>%@`#,?$~0e", max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_any_damage_to_the_text_loads_or_is_refused(start: int, length: int, inserted: str) -> None:
    _load_or_refuse(COMPLETE[:start] + inserted + COMPLETE[start + length :])


@given(
    path=st.sampled_from(keys.dotted_keys()) | st.text(max_size=20),
    value=st.text(max_size=20) | anything.map(lambda value: json.dumps(value)),
)
@settings(max_examples=150, deadline=None)
def test_any_override_loads_or_is_refused(path: str, value: str) -> None:
    _load_or_refuse(COMPLETE, (f"{path}={value}",))
    _load_or_refuse(MINIMAL, (f"{path}={value}", path))


def test_the_mutations_start_from_a_spec_that_loads() -> None:
    assert _load_or_refuse(COMPLETE) is not None
    assert _load_or_refuse(yaml.safe_dump(VALUES)) is not None
