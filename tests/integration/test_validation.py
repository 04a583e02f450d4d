"""Validation during training: it changes nothing that is trained, and says what to keep."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from job.cli.app import app
from job.errors import SpecError, StorageError
from job.families.model_source import MODELS
from job.train.validation import Validator
from tests.jobs import FULL, read_json, sets, small_run

# Nine rows to train on, seen over and over: the loss of others soon rises.
OVERFIT = {
    "data.train.limit": 20,
    "data.validation_fraction": 0.7,
    "data.eval.limit": 12,
    "eval.max_samples": 12,
    "train.eval_strategy": "steps",
    "train.eval_steps": 3,
    "train.load_best_model_at_end": "true",
    "train.learning_rate": 0.005,
    "train.lr_scheduler_type": "constant_with_warmup",
    "train.max_steps": 9,
    "train.save_steps": 100,
    "train.save_total_limit": 1,
    "export.merged.enabled": "false",
    "export.verify": "none",
}


def run(command: str, output: Path, cache: Path, settings: Mapping[str, object]) -> None:
    given = sets({**OVERFIT, **settings})
    app([command, *small_run(str(output), *given, cache=cache)[1:]], standalone_mode=False)


def lines(output: Path) -> list[dict[str, Any]]:
    text = (output / "train" / "history.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def validations(output: Path) -> dict[int, dict[str, Any]]:
    return {entry["step"]: entry for entry in lines(output) if "eval_loss" in entry}


def weights(folder: Path) -> dict[str, Any]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def equal(first: Path, second: Path) -> bool:
    ours, others = weights(first), weights(second)
    assert ours.keys() == others.keys()
    return all(tensor.equal(others[name]) for name, tensor in ours.items())


def again(output: Path, place: Path) -> Path:
    """What is left of a training that was killed before its stage was complete."""
    copied = Path(shutil.copytree(output, place / "out"))
    (copied / ".stages" / "train.json").unlink()
    shutil.rmtree(copied / "adapter")
    return copied


@pytest.fixture(scope="module")
def overfit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("overfit")
    run("run", place / "out", place / "cache", {})
    return place


def test_the_model_of_the_best_step_is_exported_and_beats_the_last_on_test_rows(
    overfit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = overfit / "out"
    found = read_json(output / "run.json")
    chosen = found["validation"]
    measured = {step: entry["eval_loss"] for step, entry in validations(output).items()}
    assert sorted(measured) == [3, 6, 9]
    best = min(measured, key=measured.__getitem__)
    assert best < 9
    assert (chosen["best_step"], chosen["exported_step"], chosen["last_step"]) == (best, best, 9)
    assert chosen["best"] == measured[best] < chosen["last"] == measured[9]
    assert found["stages"]["train"]["summary"]["validation"] == chosen
    stored = {each.name: each for each in (output / "checkpoints").iterdir()}
    assert stored.keys() == {f"step-{best}", "step-9"}
    assert equal(output / "adapter", stored[f"step-{best}"])
    assert not equal(output / "adapter", stored["step-9"])
    # The last step's model, from its checkpoint, on the same rows.
    last = Path(shutil.copytree(output, tmp_path / "last"))
    run("eval", last, overfit / "cache", {"train.load_best_model_at_end": "false"})
    said = capsys.readouterr().err
    assert "nothing was left to train step=9" in said
    assert f"the model is that of step 9 metric=eval_loss best_step={best}" in said
    assert equal(last / "adapter", stored["step-9"])
    of_last = read_json(last / "run.json")
    assert of_last["validation"]["exported_step"] == 9
    assert found["metrics"]["final"]["loss"] < of_last["metrics"]["final"]["loss"]


def test_a_best_checkpoint_that_is_damaged_or_gone_is_an_error_and_never_the_last(
    overfit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = read_json(overfit / "out" / "run.json")["validation"]["best_step"]
    output = again(overfit / "out", tmp_path)
    path = output / "checkpoints" / f"step-{best}" / "adapter_model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StorageError, match=r"adapter_model\.safetensors is damaged") as refused:
        run("train", output, overfit / "cache", {})
    assert refused.value.exit_code == 21
    [problem] = refused.value.problems
    assert problem.field.endswith(f"checkpoints/step-{best}")
    assert "train.load_best_model_at_end: false" in str(problem.fix)
    assert not (output / "adapter").exists()
    path.unlink()
    with pytest.raises(StorageError, match="a file cannot be read"):
        run("train", output, overfit / "cache", {})
    # Without its manifest it is known to be lost before anything is trained.
    (path.parent / "manifest.json").unlink()
    capsys.readouterr()
    run("train", output, overfit / "cache", {})
    said = capsys.readouterr().err
    assert "the checkpoint of the best validation is not stored" in said
    assert f"step={best} instead=9" in said
    assert equal(output / "adapter", output / "checkpoints" / "step-9")


def test_training_stops_early_and_does_not_go_on_after_a_resume(
    overfit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = {"train.early_stopping_patience": 1}
    run("train", tmp_path / "first", overfit / "cache", early)
    assert "training stops early: no improvement" in capsys.readouterr().err
    measured = validations(tmp_path / "first")
    first = read_json(tmp_path / "first" / "run.json")
    best, end = first["validation"]["best_step"], first["stages"]["train"]["summary"]["steps"]
    assert first["validation"]["stopped_early"] is True
    assert [*measured][-2:] == [best, best + 3]
    assert end == best + 3 == lines(tmp_path / "first")[-1]["step"] < 9
    assert equal(tmp_path / "first" / "adapter", tmp_path / "first/checkpoints" / f"step-{best}")
    output = again(tmp_path / "first", tmp_path)
    run("train", output, overfit / "cache", early)
    assert f"nothing was left to train step={end}" in capsys.readouterr().err
    resumed = read_json(output / "run.json")
    assert resumed["stages"]["train"]["summary"]["steps"] == end
    for key in ("best_step", "best", "last_step", "last", "exported_step", "stopped_early"):
        assert resumed["validation"][key] == first["validation"][key]
    assert equal(output / "adapter", tmp_path / "first" / "adapter")
    # More patience goes on from there.
    more = {"train.early_stopping_patience": 3}
    run("train", output, overfit / "cache", more)
    assert [*validations(output)] == [3, 6, 9]
    assert equal(output / "adapter", overfit / "out" / "adapter")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_validation_changes_nothing_that_is_trained(
    overfit: Path, tmp_path: Path, method: str
) -> None:
    """Often, with dropout and sampled answers, or once at the end."""
    dropout = {"lora.lora_dropout": 0.1}
    sampled: dict[str, object] = {
        "train.max_steps": 4,
        "train.eval_steps": 1,
        "train.save_steps": 4,
        "train.load_best_model_at_end": "false",
        "train.predict_with_generate": "true",
        "eval.generation.do_sample": "true",
        **({**FULL, "export.merged.enabled": "true"} if method == "full" else dropout),
    }
    run("train", tmp_path / "often", overfit / "cache", sampled)
    run("train", tmp_path / "once", overfit / "cache", {**sampled, "train.eval_steps": 100})
    often, once = tmp_path / "often", tmp_path / "once"
    assert [*validations(often)] == [1, 2, 3, 4]
    assert [*validations(once)] == [4]
    kept = ("step", "loss", "grad_norm", "learning_rate", "epoch")
    steps = [
        [{key: entry[key] for key in kept} for entry in lines(output) if "loss" in entry]
        for output in (often, once)
    ]
    assert steps[0] == steps[1]
    states = ("optimizer", "scheduler", "rng_state")
    same = {f"{name}.{kind}" for name in states for kind in ("json", "safetensors")}
    for path in sorted((once / "checkpoints" / "step-4").iterdir()):
        if path.name in same or path.name.endswith("model.safetensors"):
            assert (often / "checkpoints" / "step-4" / path.name).read_bytes() == path.read_bytes()
    last = [validations(output)[4] for output in (often, once)]
    seconds = [entry.pop("eval_seconds") for entry in last]
    assert min(seconds) > 0
    assert last[0] == last[1]
    assert {"eval_loss", "eval_cer", "eval_exact_match"} <= last[0].keys()


def test_a_training_of_which_no_validation_is_finite_keeps_no_model(
    overfit: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Validator, "_loss", lambda *_: math.nan)
    with pytest.raises(SpecError, match="no validation gave a finite eval_loss") as refused:
        run("train", tmp_path / "out", overfit / "cache", {"train.max_steps": 1})
    assert refused.value.problems[0].field == "$.train.load_best_model_at_end"
    assert "the validation loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_damaged_base_is_named_instead_of_the_learning_rate(
    overfit: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(MODELS / "ernie-vl-tiny", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name][:] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    settings = {"model.model_name_or_path": model, "train.max_steps": 1}
    with pytest.raises(SpecError, match=r"norm\.weight has values that are not finite") as refused:
        run("train", tmp_path / "out", overfit / "cache", settings)
    assert refused.value.problems[0].field == "$.model.model_name_or_path"
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.slow
def test_a_metric_that_is_equal_in_all_validations_keeps_the_first_with_a_warning(
    overfit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {
        "train.max_steps": 2,
        "train.eval_steps": 1,
        "train.metric_for_best_model": "exact_match",
        "eval.validation_samples": 2,
    }
    run("train", tmp_path / "out", overfit / "cache", same)
    said = capsys.readouterr().err
    assert {entry["eval_exact_match"] for entry in validations(tmp_path / "out").values()} == {0}
    assert "eval_exact_match is the same in all validations" in said
    assert "the best model is kept step=1" in said
    # The fix: the last step's model, and nothing is trained again.
    run(
        "train",
        tmp_path / "out",
        overfit / "cache",
        {**same, "train.load_best_model_at_end": "false"},
    )
    said = capsys.readouterr().err
    assert "nothing was left to train step=2" in said
    assert equal(tmp_path / "out" / "adapter", tmp_path / "out" / "checkpoints" / "step-2")
