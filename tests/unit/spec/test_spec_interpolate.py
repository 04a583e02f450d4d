"""Variables are replaced, numbers stay numbers, and secrets are seen nowhere."""

import json
import re
from collections.abc import Mapping

import pytest

from job import redaction
from job.errors import SpecError
from job.spec.load import LoadedSpec, dump_resolved, load_spec
from job.spec.overrides import KeyValue

MINIMAL = """
version: 1
name: sample
model: {model_name_or_path: models/base}
data: {train: {uri: data/train.jsonl}}
output: {uri: outputs/sample}
"""


def _load(extra: str, environ: Mapping[str, str] | None = None) -> LoadedSpec:
    return load_spec(MINIMAL + extra, "job.yaml", environ=environ or {})


def _error(extra: str, environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        _load(extra, environ)
    return str(caught.value)


def _cache_dir(text: str, **environ: str) -> str:
    return _load(f"runtime: {{cache_dir: {text}}}", environ).spec.runtime.cache_dir


@pytest.fixture(autouse=True)
def _forget_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"/a/${USER_NAME}/b"', "/a/ada/b"),
        ('"${USER_NAME}${USER_NAME}"', "adaada"),
        ('"${MISSING,x}"', "x"),
        ('"${MISSING, x , y }"', "x , y"),
        ('"${USER_NAME,x}"', "ada"),
        ('"${EMPTY,x}"', "x"),
        ('"$${USER_NAME}"', "${USER_NAME}"),
        ('"$$${USER_NAME}"', "$${USER_NAME}"),
        ('"$USER_NAME costs $5 {}"', "$USER_NAME costs $5 {}"),
        ('"${NESTED}"', "${USER_NAME}"),
    ],
)
def test_variables_in_text(text: str, expected: str) -> None:
    assert _cache_dir(text, USER_NAME="ada", EMPTY="", NESTED="${USER_NAME}") == expected


def test_a_plain_scalar_that_is_one_variable_is_read_as_yaml() -> None:
    spec = _load(
        "train:\n  max_steps: ${STEPS}\n  learning_rate: ${LR,2e-5}\n  report_to: ${TRACKERS}\n"
        "lora:\n  use_dora: ${DORA}\n",
        {"STEPS": "60", "TRACKERS": "[wandb, mlflow]", "DORA": "true"},
    ).spec
    assert (spec.train.max_steps, spec.train.learning_rate) == (60, 2e-5)
    assert spec.train.report_to == ("wandb", "mlflow")
    assert spec.lora.use_dora is True


def test_an_empty_default_is_null() -> None:
    assert _load("runtime:\n  workdir: ${WORK,}\n").spec.runtime.workdir is None


def test_a_quoted_variable_stays_text() -> None:
    assert _error('train:\n  max_steps: "${STEPS}"\n', {"STEPS": "60"}).startswith(
        'job.yaml:8 $.train.max_steps: must be a whole number of at least -1 (found "60")\n'
    )


def test_a_variable_where_only_text_can_stand_stays_text() -> None:
    spec = _load("runtime:\n  cache_dir: ${DIRECTORY}\n", {"DIRECTORY": "2024"}).spec
    assert spec.runtime.cache_dir == "2024"


def test_a_missing_variable_is_named_with_the_fix() -> None:
    assert _error("train:\n  max_steps: ${STEPS}\n") == (
        "job.yaml:8 $.train.max_steps: the environment variable STEPS is not set "
        "(found ${STEPS})\n"
        "    fix: export STEPS=…, or give a default: ${STEPS,value}\n"
        "    see: python -m job reference train.max_steps"
    )


def test_a_missing_variable_with_a_neighbour_names_it() -> None:
    message = _error("train:\n  max_steps: ${STEPS}\n", {"STEP": "1"})
    assert "${STEPS,value}; STEP is set\n" in message


def test_every_missing_variable_is_told_at_once() -> None:
    message = _error('train:\n  seed: ${A}\nruntime: {cache_dir: "${B}/${C}"}\n')
    assert [name for name in "ABC" if f"variable {name} is not set" in message] == ["A", "B", "C"]


@pytest.mark.parametrize("text", ["${", "${}", "${A-B}", "${1}", "${A,${B}}", "a ${ b"])
def test_what_opens_no_variable_is_refused(text: str) -> None:
    message = _error(f"runtime:\n  cache_dir: '{text}'\n", {"B": "1"})
    assert "job.yaml:8 $.runtime.cache_dir: contains `${` without a variable" in message
    assert "$${ for a literal ${" in message


def test_a_value_that_is_no_yaml_names_its_variable() -> None:
    message = _error("train:\n  report_to: ${TRACKERS}\n", {"TRACKERS": "[wandb"})
    assert message.startswith(
        "job.yaml:8 $.train.report_to: the value of TRACKERS is not valid YAML: "
    )


def test_a_secret_is_used_but_shown_by_its_name() -> None:
    loaded = _load('runtime: {cache_dir: "/a/${API_TOKEN}/b"}', {"API_TOKEN": "hunter-22"})
    assert loaded.spec.runtime.cache_dir == "/a/hunter-22/b"
    assert loaded.resolved["runtime"]["cache_dir"] == "/a/${API_TOKEN}/b"
    assert "hunter-22" not in dump_resolved(loaded)
    assert redaction.redact("it is hunter-22") == "it is ${API_TOKEN}"


def test_a_secret_shown_by_its_name_loads_again_where_the_variable_is_set() -> None:
    environ = {"API_TOKEN": "hunter-22"}
    loaded = _load("runtime:\n  cache_dir: ${API_TOKEN}\n", environ)
    assert load_spec(dump_resolved(loaded), "again.yaml", environ=environ) == loaded


def test_a_secret_typed_into_the_spec_is_shown_by_its_name() -> None:
    redaction.add_secret("API_TOKEN", "hunter-22")
    loaded = _load('runtime: {cache_dir: "/a/hunter-22"}')
    assert loaded.resolved["runtime"]["cache_dir"] == "/a/${API_TOKEN}"


def test_a_password_in_a_url_is_not_shown() -> None:
    loaded = _load('train: {resume_from_checkpoint: "ftp://me:pass@host/step-1"}')
    assert loaded.spec.train.resume_from_checkpoint == "ftp://me:pass@host/step-1"
    assert loaded.resolved["train"]["resume_from_checkpoint"] == "ftp://***@host/step-1"


@pytest.mark.parametrize("secret", ["Hunter_22 x", "abc", " 1234567\n", "[x"])
@pytest.mark.parametrize(
    "extra",
    [
        "train:\n  seed: ${MY_TOKEN}\n",
        "train:\n  optim: ${MY_TOKEN}\n",
        "train:\n  report_to: ${MY_TOKEN}\n",
        "train: {unknown: {deep: '${MY_TOKEN}'}}\n",
        "export: {merged: {max_shard_size: '${MY_TOKEN}'}}\n",
    ],
)
def test_a_secret_appears_in_no_message(extra: str, secret: str) -> None:
    message = _error(extra, {"MY_TOKEN": secret})
    assert "${MY_TOKEN}" in message
    for spelling in (secret, secret.strip(), secret.lower(), secret.strip().replace("_", "")):
        assert spelling not in message


UNNAMED = "Zq3vX9kLm2Np8RtYw5"
SECRETS = {
    "DB_PASS": "planted",
    "MY_PWD": "planted/with slash",
    "STORE_KEY": "planted",
    "GIT_PAT": "planted",
    "BLOB_SAS": "sv=1&sig=planted",
    "JWT": "planted",
    "ANYTHING": UNNAMED,
    "HUB": "hf_abcdefghijKLMNOPqrstuvwx",
    "SOURCE": "https://me:planted@host/x",
    "LIST": "https://host/rows.jsonl?apikey=planted",
}
PLACES = (
    "data: {{train: {{uri: {text}}}}}",
    "data: {{train: {{uri: data/x, format: {text}}}}}",
    "runtime: {{cache_dir: {text}}}",
    "train: {{max_steps: {text}}}",
    "train: {{report_to: [{text}]}}",
    "lora: {{target_modules: [{text}]}}",
    "unknown: {{deep: {text}}}",
)


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("place", PLACES)
def test_a_secret_of_any_name_is_shown_by_it_wherever_it_stands(name: str, place: str) -> None:
    value = SECRETS[name]
    text = f'"${{{name}}}"'
    spec = MINIMAL.replace("data: {train: {uri: data/train.jsonl}}\n", "")
    if not place.startswith("data"):
        spec = MINIMAL
    try:
        loaded = load_spec(spec + place.format(text=text), "job.yaml", environ={name: value})
    except SpecError as error:
        shown = str(error)
    else:
        shown = dump_resolved(loaded)
        assert load_spec(shown, "again.yaml", environ={name: value}) == loaded
    assert f"${{{name}}}" in shown
    assert "planted" not in shown
    assert value not in shown
    assert value not in redaction.redact(f"an error of {value}")


def test_what_an_ordinary_spec_reads_stays_readable_and_loads_without_the_variables() -> None:
    environ = {
        "STEPS": "60",
        "OUTPUT": "s3://bucket/runs/8c7dd922ad47494fc02c388e12c00eac",
        "IM2LATEX": "/mnt/data/im2latex",
        "INSTRUCTION": "Write the formula as LaTeX.",
        "WHICH": "adamw_torch",
        "DORA": "true",
        "MODEL": "hf://Qwen/Qwen2-VL-7B-Instruct@main",
    }
    text = """
version: 1
name: sample
model: {model_name_or_path: "${MODEL}"}
data:
  train: {uri: "${IM2LATEX}/train.jsonl"}
  instruction: ${INSTRUCTION}
train:
  max_steps: ${STEPS}
  optim: ${WHICH}
  learning_rate: ${RATE,2e-5}
lora:
  use_dora: ${DORA}
output: {uri: "${OUTPUT}"}
"""
    loaded = load_spec(text, "job.yaml", environ=environ)
    shown = dump_resolved(loaded)
    assert "${" not in shown
    assert load_spec(shown, "again.yaml", environ={}) == loaded


def test_what_a_spec_reads_of_a_name_that_tells_nothing_is_a_secret() -> None:
    environ = {"DB_LOGIN": "hunter2correct"}
    spec = MINIMAL.replace("data: {", 'data: {instruction: "User ${DB_LOGIN}", ', 1)
    loaded = load_spec(spec, "job.yaml", environ=environ)
    assert loaded.spec.data.instruction == "User hunter2correct"
    assert "hunter2correct" not in dump_resolved(loaded)
    assert redaction.redact("hunter2correct said") == "${DB_LOGIN} said"


def test_a_default_that_a_spec_gives_is_its_own_and_loads_again() -> None:
    for default in ("x", "none", "outputs/latex"):
        loaded = _load(f'runtime: {{cache_dir: "${{SOME_WHERE,{default}}}"}}')
        assert load_spec(dump_resolved(loaded), "again.yaml", environ={}) == loaded
    loaded = _load('runtime: {cache_dir: "${SOME_KEY,a-default-key}"}')
    assert "a-default-key" not in dump_resolved(loaded)


def test_a_password_that_is_a_variable_of_its_own_stays_so_in_its_url() -> None:
    environ = {"FTP_PASS": "pl/an'ted"}
    loaded = _load('train: {resume_from_checkpoint: "ftp://me:${FTP_PASS}@host/x"}', environ)
    assert loaded.resolved["train"]["resume_from_checkpoint"] == "ftp://me:${FTP_PASS}@host/x"
    assert load_spec(dump_resolved(loaded), "again.yaml", environ=environ) == loaded


@pytest.mark.parametrize("steering", ["\u202e", "\x9b2J", "\u2066", "\u200f", "\U000e0041", "\x85"])
def test_a_resolved_spec_steers_no_terminal_and_loads_as_the_same(steering: str) -> None:
    loaded = load_spec(
        MINIMAL, "job.yaml", [KeyValue(None, "data.instruction", json.dumps(f"a{steering}b"))]
    )
    shown = dump_resolved(loaded)
    assert steering[0] not in shown
    assert load_spec(shown, "again.yaml", environ={}) == loaded


@pytest.mark.parametrize("steering", ["\\e]8;;x\\e", "\\x9b2J", "\\u202e"])
def test_no_message_of_a_bad_spec_steers_a_terminal(steering: str) -> None:
    for extra in (
        f'"a{steering}": 1\n',
        f'train: {{optim: "a{steering}"}}\n',
        f'lora: {{"a{steering}": {{b: 1}}}}\n',
    ):
        message = _error(extra)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", message), message


def test_a_literal_variable_survives_the_resolved_spec() -> None:
    loaded = _load('runtime: {cache_dir: "$${HOME}/x"}')
    assert loaded.spec.runtime.cache_dir == "${HOME}/x"
    assert load_spec(dump_resolved(loaded), "again.yaml", environ={}) == loaded
