"""A training that continues from an adapter, as a user runs it: what it starts from, and leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from job.cli.app import app
from job.errors import InputError, SpecError, UsageError
from job.pipeline.context import RunContext
from job.spec.load import load_spec
from tests.jobs import FORMULAS, SMALL, job, read_json, sets, sums

slow = pytest.mark.slow
SETTINGS: dict[str, object] = {
    **SMALL,
    **FORMULAS,
    "data.train.limit": 16,
    "train.max_steps": 2,
    "train.per_device_train_batch_size": 4,
    "eval.metrics": "[exact_match]",
    "eval.generation.max_new_tokens": 2,
    "runtime.accelerator": "cpu",
}


def here(*arguments: str) -> None:
    """Runs the command in this process: it raises its errors as they are."""
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None:
        raise done.exception


def arguments(output: Path, cache: Path, **more: object) -> list[str]:
    every = {**SETTINGS, "runtime.cache_dir": cache, **more}
    return ["specs/latex.yaml", "--output", str(output), *sets(every)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The output of a run whose adapter the others continue."""
    output = tmp_path_factory.mktemp("first") / "out"
    here("run", *arguments(output, cache))
    return output


def loss(output: Path, name: str) -> float:
    measured: float = read_json(output / "run.json")["metrics"][name]["loss"]
    return measured


def test_training_goes_on_where_the_adapter_ended(first: Path, cache: Path, tmp_path: Path) -> None:
    adapter, second = first / "adapter", tmp_path / "out"
    here("run", *arguments(second, cache, **{"model.adapter_name_or_path": adapter}))
    run = read_json(second / "run.json")
    assert run["inputs"]["adapter"]["uri"] == str(adapter)
    # Before is the model with the adapter, not the base.
    assert loss(second, "baseline") == pytest.approx(loss(first, "final"), rel=1e-5)
    assert run["stages"]["baseline"]["summary"]["adapter"] == str(adapter)
    assert str(adapter) in (second / "report.html").read_text()
    # What is exported stands alone: against the same base, and merged into it.
    proof = run["stages"]["export"]["summary"]
    assert proof["adapter_reloaded"]["relative_rms"] < 1e-4
    assert proof["merged_reloaded"]["same_answers"] == proof["merged_reloaded"]["probes"]
    own, other = (load_file(each / "adapter/adapter_model.safetensors") for each in (first, second))
    assert {*own} == {*other}
    assert any(not own[name].equal(other[name]) for name in own)


def test_eval_of_any_adapter_writes_nothing_at_the_output(
    first: Path, cache: Path, tmp_path: Path
) -> None:
    before = sums(first)
    asked = arguments(first, cache)
    here("eval", *asked, "--adapter", str(first / "adapter"), "--to", str(tmp_path / "to"))
    measured = read_json(tmp_path / "to/eval/adapter.json")
    assert measured["metrics"]["loss"] == pytest.approx(loss(first, "final"), rel=1e-5)
    lines = (tmp_path / "to/eval/adapter.predictions.jsonl").read_text().splitlines()
    assert len(lines) == len((first / "eval/predictions.jsonl").read_text().splitlines())
    assert sums(first) == before
    with pytest.raises(UsageError, match="is inside the output of a run"):
        here("eval", *asked, "--adapter", str(first / "adapter"), "--to", str(first / "eval"))


def test_infer_answers_with_any_adapter_without_a_run(
    first: Path, cache: Path, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    asked = ["infer", *arguments(nowhere, cache, **{"lora.r": 2}), "--question", "1+1"]
    here(*asked, "--adapter", str(first / "adapter"))
    assert not nowhere.exists()
    with pytest.raises(UsageError, match="cannot be combined with --weights base"):
        here(*asked, "--adapter", str(first / "adapter"), "--weights", "base")
    with pytest.raises(InputError, match="is the output of a run, not an adapter") as refused:
        here(*asked, "--adapter", str(first))
    assert refused.value.problems[0].fix == f"write {first}/adapter"


def test_an_adapter_that_lora_does_not_describe_is_refused_before_any_stage(
    first: Path, cache: Path, tmp_path: Path
) -> None:
    more = {"model.adapter_name_or_path": first / "adapter", "lora.r": 2}
    with pytest.raises(SpecError, match="has rank 16 at ") as refused:
        here("run", *arguments(tmp_path / "out", cache, **more))
    assert "write r: 16, lora_alpha: 32" in str(refused.value)
    assert read_json(tmp_path / "out/run.json")["stages"] == {}


@pytest.mark.parametrize("folder", ["adapter", ""])
def test_an_adapter_named_as_the_model_is_answered_with_its_key(
    folder: str, first: Path, cache: Path, tmp_path: Path
) -> None:
    more = {"model.model_name_or_path": first / folder}
    with pytest.raises(InputError, match=r"is (an adapter|the output of a run), not a model") as no:
        here("plan", *arguments(tmp_path / "out", cache, **more))
    [problem] = no.value.problems
    assert "model_name_or_path: builtin://ernie-vl-tiny and " in str(problem.fix)
    assert f"adapter_name_or_path: {first}/adapter" in str(problem.fix)


def test_another_adapter_at_the_same_place_is_another_training(
    first: Path, cache: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(first / "adapter", tmp_path / "adapter")
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    overrides = [*settings, f"model.adapter_name_or_path={adapter}", f"runtime.cache_dir={cache}"]
    loaded = load_spec(Path("specs/latex.yaml").read_text(), "x", overrides)

    def identity() -> str:
        return RunContext(loaded, "train").inputs.checkpoint_identity().fingerprint

    same, path = identity(), adapter / "adapter_model.safetensors"
    assert identity() == same
    tensors = load_file(path)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, path)
    assert identity() != same


@slow
def test_saved_modules_and_patterns_resume_to_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    lora = {
        "r": 4,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"fc1": 5},
        "layers_to_transform": [0, 1],
        "modules_to_save": ["embed_tokens", "layers.1.input_layernorm"],
    }
    more = {
        "lora": yaml.safe_dump(lora, default_flow_style=True).strip(),
        "train.lr_scheduler_type": "constant",
        "train.save_steps": 1,
        "train.warmup_steps": 0,
    }
    results: list[dict[str, Any]] = []
    for name, lengths in (("whole", (3,)), ("parts", (1, 3))):
        output = tmp_path / name
        for steps in lengths:
            settings = {**more, "train.max_steps": steps}
            done = job("train", *arguments(output, cache, **settings))
            assert done.code == 0, done.err
        train = read_json(output / "run.json")["stages"]["train"]
        results.append({f["path"]: f["sha256"] for f in train["files"] if "adapter/" in f["path"]})
        assert train["summary"]["resumed_from_step"] == lengths[0] * (len(lengths) - 1)
    assert results[0] == results[1]
    stored = json.loads((tmp_path / "parts/adapter/adapter_config.json").read_text())
    assert stored["ensure_weight_tying"] is True
