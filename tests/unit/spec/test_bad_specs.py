"""Malformed specs: each ends as one clear error, none as a traceback."""

import string
from contextlib import suppress
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from job.errors import JobError, SpecError
from job.spec.load import load_spec
from job.spec.parse import decode

GOOD: dict[str, Any] = {
    "version": 1,
    "name": "test",
    "model": {"model_name_or_path": "builtin://ernie-vl-tiny", "init": "random"},
    "data": {"train": {"uri": "builtin://formulas", "limit": 10}, "eval_fraction": 0.2},
    "output": {"uri": "out"},
}

# A text that is no spec at all, and a part of what the error says.
TEXTS = {
    "": "empty",
    "\n\n# nothing\n": "empty",
    "just text": "mapping",
    "- a\n- b": "mapping",
    "42": "mapping",
    "null": "",
    "{": "",
    "name: [1, 2": "",
    "name: 'unclosed": "",
    "a: 1\n\tb: 2": "",
    "a: 1\na: 2": "",
    "? [a, b]\n: 1": "",
    "1: 2": "",
    "a: &x [*x]": "",
    "a: *nowhere": "",
    "--- {}\n--- {}": "",
    "a: !!python/object/apply:os.system [true]": "",
    "a: !custom 1": "",
    "%YAML 9.9\n---\na: 1": "",
    "a: \x07": "",
    "version: 1\nname: ${UNSET_VARIABLE}": "UNSET_VARIABLE",
    "version: 1\nname: ${": "",
    "version: 1\nname: ${A B}": "",
}

# A path into GOOD, and what is put there: each is refused with that path, or its parent, named.
REFUSED: dict[str, tuple[Any, ...]] = {
    "version": (2, "1", None, 1.5, [1]),
    "name": ("", 5, None, "a/b", "../up", "x" * 300),
    "model": (None, "path", [], {}),
    "model.model_name_or_path": ("", None, 3, []),
    "model.init": ("warm", 1, None),
    "model.family": ("gpt", 7),
    "model.trust_remote_code": ("yes", 1, None),
    "data": (None, [], "rows.jsonl"),
    "data.train": (None, "rows.jsonl", []),
    "data.train.uri": ("", None, 1, "ftp//x\n"),
    "data.train.limit": (0, -1, 1.5, "ten", 10**30),
    "data.train.format": ("csv", 1),
    "data.eval_fraction": (-0.1, 1.0, 2, "half", float("nan")),
    "data.max_bad_rows": (-1, "many", None),
    "data.truncation_strategy": ("middle", 0),
    "lora.r": (0, -8, 1.5, "16", None),
    "lora.lora_dropout": (-0.1, 1.5, "x"),
    "lora.method": ("qlora", None),
    "lora.rank_pattern": ([], "q_proj", 8, None, {"q_proj": 0}, {"q_proj": "8"}, {"(": 8}),
    "lora.layers_to_transform": (-1, [], [0, 0], "first", [1.5]),
    "lora.modules_to_save": ([], "lm_head", [1]),
    "model.adapter_name_or_path": ("", 3, [], "builtin://adapter"),
    "train.learning_rate": (0, -1, "fast", float("inf"), float("nan")),
    "train.max_steps": (0, 1.5, "many", [1]),
    "train.optim": ("adamm", 1),
    "train.report_to": ("wandbb", 5, [1]),
    "train.packing": (True, "yes"),
    "train.padding_free": ("yes", 1, None),
    "train.group_by_length": ("yes", 1, None),
    "train.torch_compile": ("reduce-overhead", 1, None),
    "train.save_steps": (0, -5, "often"),
    "train.resume_from_checkpoint": (True, "", 3),
    "eval.metrics": (["f1"], "cer", [3]),
    "eval.generation.max_new_tokens": (0, -1, "all"),
    "eval.generation.temperature": (-1, "hot"),
    "export.merged.dtype": ("int8", 16),
    "export.merged.max_shard_size": ("big", "-5GB", ""),
    "export.adapter": (False, 1),
    "output.uri": ("", None, 5, "hf://datasets/org/repo", "https://host/x"),
    "runtime.accelerator": ("tpu", 0),
    "nonsense": (1, None, {}),
    "train.learning_rte": (1e-4,),
    "data.train.url": ("rows.jsonl",),
}
VALUES = [(path, value) for path, values in REFUSED.items() for value in values]


def changed(path: str, value: Any) -> str:
    spec: dict[str, Any] = yaml.safe_load(yaml.safe_dump(GOOD))
    *parents, last = path.split(".")
    place = spec
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return yaml.safe_dump(spec)


def refused(text: str) -> SpecError:
    with pytest.raises(SpecError) as raised:
        load_spec(text, "spec.yaml", environ={})
    assert raised.value.exit_code == 10
    for problem in raised.value.problems:
        assert problem.field
        assert problem.message
        assert "Traceback" not in str(problem)
    return raised.value


def test_the_spec_that_the_malformed_ones_are_made_from_is_valid() -> None:
    assert load_spec(yaml.safe_dump(GOOD), "spec.yaml", environ={}).spec.name == "test"


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_a_text_that_is_no_spec_is_refused(text: str) -> None:
    assert TEXTS[text] in str(refused(text))


@pytest.mark.parametrize(("path", "value"), VALUES, ids=lambda each: repr(each)[:40])
def test_a_value_that_cannot_be_is_refused_at_its_path(path: str, value: Any) -> None:
    error = refused(changed(path, value))
    named = [problem.field.rpartition(" ")[2] for problem in error.problems]
    above = f"$.{path.rpartition('.')[0]}".rstrip(".")
    assert any(name == above or name.startswith(f"$.{path}") for name in named), error


def test_at_least_sixty_malformed_specs_are_tried() -> None:
    assert len(TEXTS) + len(VALUES) >= 60


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"name: \xc3\x28", b"\x00" * 10])
def test_bytes_that_are_no_text_are_refused(data: bytes) -> None:
    with pytest.raises(JobError) as raised:
        load_spec(decode(data, "spec.yaml"), "spec.yaml", environ={})
    assert raised.value.exit_code in (10, 12)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(string.ascii_lowercase, max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
paths = st.sampled_from(sorted({*REFUSED, "train", "lora", "eval", "export"}))


@settings(max_examples=150, deadline=None)
@given(path=paths, value=values)
def test_whatever_stands_at_a_key_is_taken_or_refused_clearly(path: str, value: Any) -> None:
    with suppress(SpecError):
        load_spec(changed(path, value), "spec.yaml", environ={})


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=80) | st.text("{}[]:-?&*!|>'\"%@#,\n ab1", max_size=40))
def test_whatever_the_text_is_it_is_refused_clearly(text: str) -> None:
    with pytest.raises(SpecError):
        load_spec(text, "spec.yaml", environ={})
