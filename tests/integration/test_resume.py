"""A training that was interrupted ends as one that was not: the same losses, the same adapter."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.cli.app import app
from job.errors import InputError
from job.train.checkpoint.storage import MANIFEST
from tests.jobs import FULL, read_json, small_run

# Three batches an epoch, steps logged in pairs, dropout and noise, groups of weights with learning
# rates of their own, and a last step within an epoch that moves the weights: what a resume can get
# wrong.
SETTINGS = {
    "data.train.limit": 24,
    "train.max_steps": 8,
    "train.lr_scheduler_type": "constant_with_warmup",
    "train.save_steps": 3,
    "train.logging_steps": 2,
    "train.save_total_limit": 5,
    "train.loraplus_lr_ratio": 1.5,
    "train.vision_tower_lr": 5e-4,
    "train.neftune_noise_alpha": 5,
    "lora.lora_dropout": 0.1,
}
COMPARED = ("step", "epoch", "loss", "learning_rate", "learning_rates", "grad_norm")


def train(output: Path, cache: Path, **settings: object) -> None:
    run("train", output, cache, settings)


def run(command: str, output: Path, cache: Path, settings: Mapping[str, object]) -> None:
    values = {**SETTINGS, **settings}
    given = [f"{key}={value}" for key, value in values.items() if value is not None]
    sets = [item for each in given for item in ("--set", each)]
    app([command, *small_run(str(output), *sets, cache=cache)[1:]], standalone_mode=False)


def history(output: Path) -> list[dict[str, float]]:
    lines = (output / "train" / "history.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in COMPARED} for line in lines]


def digests(output: Path) -> dict[str, str]:
    files = read_json(output / ".stages" / "train.json")["files"]
    return {f["path"]: f["sha256"] for f in files if f["path"].startswith(("adapter/", "weights/"))}


def checkpoints(output: Path) -> dict[str, bytes]:
    """Every file of every checkpoint."""
    files = sorted((output / "checkpoints").glob("*/*"))
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("undisturbed")
    train(place / "out", place / "cache")
    return place


def interrupted(undisturbed: Path, place: Path, step: int) -> Path:
    """What a training leaves that was killed after it had stored the checkpoint of `step`."""
    output = Path(shutil.copytree(undisturbed / "out", place / "out"))
    (output / ".stages" / "train.json").unlink()
    for trained in ("adapter", "weights"):
        shutil.rmtree(output / trained, ignore_errors=True)
    for checkpoint in (output / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return output


def test_checkpoints_hold_no_pickle(undisturbed: Path) -> None:
    checkpoints = sorted((undisturbed / "out" / "checkpoints").iterdir())
    assert [each.name for each in checkpoints] == ["step-3", "step-6", "step-8"]
    for each in checkpoints:
        assert {path.suffix for path in each.iterdir()} <= {".json", ".safetensors", ".md"}
        stored = {file["path"] for file in read_json(each / MANIFEST)["files"]}
        for state in ("optimizer", "scheduler", "rng_state"):
            assert {f"{state}.json", f"{state}.safetensors"} <= stored


# After step 3 an epoch ends, after 6 one that more follow, and 8 is the last one.
@pytest.mark.parametrize(("step", "workers"), [(3, 2), (6, 0), (8, 0)])
def test_a_resumed_training_is_bit_equal_to_an_undisturbed_one(
    undisturbed: Path,
    tmp_path: Path,
    step: int,
    workers: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = interrupted(undisturbed, tmp_path, step)
    train(output, tmp_path / "cache", **{"train.dataloader_num_workers": workers})
    assert f"resuming step={step}" in capsys.readouterr().err
    assert history(output) == history(undisturbed / "out")
    assert digests(output) == digests(undisturbed / "out")
    assert checkpoints(output) == checkpoints(undisturbed / "out")
    resumed, whole = (
        read_json(each / "run.json")["stages"]["train"]["summary"]
        for each in (output, undisturbed / "out")
    )
    for fact in ("steps", "epochs", "tokens", "first_loss", "final_loss"):
        assert resumed[fact] == whole[fact] > 0


def test_a_damaged_newest_checkpoint_costs_steps_and_changes_nothing(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = interrupted(undisturbed, tmp_path, 6)
    weights = output / "checkpoints" / "step-6" / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-100] ^= 1
    weights.write_bytes(damaged)
    train(output, tmp_path / "cache")
    said = capsys.readouterr().err
    assert "checkpoint skipped step=6" in said
    assert "adapter_model.safetensors is damaged" in said
    assert "resuming step=3" in said
    assert digests(output) == digests(undisturbed / "out")


def rewrite(checkpoint: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the tensors of a checkpoint's file, and the manifest with them."""
    tensors = load_file(checkpoint / file)
    change(tensors)
    save_file(tensors, checkpoint / file)
    manifest = read_json(checkpoint / MANIFEST)
    for entry in manifest["files"]:
        data = (checkpoint / entry["path"]).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_that_holds_something_else_costs_steps_and_changes_nothing(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = interrupted(undisturbed, tmp_path, 8)
    steps = output / "checkpoints"
    rewrite(steps / "step-8", "adapter_model.safetensors", lambda tensors: tensors.popitem())
    rewrite(
        steps / "step-6",
        "optimizer.safetensors",
        lambda tensors: tensors.update({"state.state.0.exp_avg": torch.zeros(7)}),
    )
    named = {"train.resume_from_checkpoint": steps / "step-6"}
    with pytest.raises(InputError, match=r"exp_avg of 0 has the shape \[7\]") as refused:
        train(output, tmp_path / "cache", **named)
    assert refused.value.exit_code == 12
    assert refused.value.problems[0].field == "$.train.resume_from_checkpoint"
    capsys.readouterr()
    train(output, tmp_path / "cache")
    said = capsys.readouterr().err
    assert re.search(r"checkpoint skipped step=8 reason=.* is missing", said)
    assert re.search(r"checkpoint skipped step=6 reason=.*exp_avg of 0 has the shape \[7\]", said)
    assert "resuming step=3" in said
    assert digests(output) == digests(undisturbed / "out")
    assert checkpoints(output) == checkpoints(undisturbed / "out")


def test_a_longer_training_goes_on_from_a_shorter_one_of_the_same_rates(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = {"train.max_steps": 9}
    train(tmp_path / "whole", tmp_path / "cache", **longer)
    output = Path(shutil.copytree(undisturbed / "out", tmp_path / "out"))
    capsys.readouterr()
    train(output, tmp_path / "cache", **longer)
    said = capsys.readouterr().err
    assert "resuming step=8" in said
    assert "checkpoint skipped" not in said
    assert digests(output) == digests(tmp_path / "whole")
    assert [entry["step"] for entry in history(output)] == [2, 3, 4, 6, 8, 9]
    # What is past the end of a shorter one stays for the longer one.
    train(output, tmp_path / "cache", **{"train.max_steps": 3})
    said = capsys.readouterr().err
    assert 'checkpoint skipped step=9 reason="it is past the 3 steps of this training"' in said
    assert "resuming step=3" in said
    assert history(output) == history(undisturbed / "out")[:2]
    assert (output / "checkpoints" / "step-9" / MANIFEST).exists()


def test_a_training_that_starts_from_the_beginning_beside_checkpoints_says_what_changed(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = interrupted(undisturbed, tmp_path, 3)
    train(output, tmp_path / "cache", **{"train.max_steps": 1, "train.learning_rate": 0.5})
    said = capsys.readouterr().err
    assert (
        "belongs to another spec, model or data set: train.learning_rate was 0.002 and is 0.5"
        in (said)
    )
    assert "training starts from the beginning" in said


def test_a_resumed_full_fine_tuning_is_bit_equal_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = {**FULL, "lora.lora_dropout": None, "train.loraplus_lr_ratio": None}
    train(tmp_path / "out", tmp_path / "cache", **full)
    output = interrupted(tmp_path, tmp_path / "again", 6)
    train(output, tmp_path / "cache", **full)
    assert "resuming step=6" in capsys.readouterr().err
    assert history(output) == history(tmp_path / "out")
    assert any(path.startswith("weights/") for path in digests(output))
    assert digests(output) == digests(tmp_path / "out")


@pytest.mark.slow
def test_a_job_on_a_base_in_4_bits_resumes_bit_equal_and_exports_with_proof(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    settings = {
        "model.load_in_4bit": "true",
        "lora.finetune_experts": "true",
        "lora.lora_dropout": None,
        "train.neftune_noise_alpha": None,
        "train.max_steps": 4,
        "train.save_steps": 2,
    }
    place = tmp_path / "undisturbed"
    run("run", place / "out", place / "cache", settings)
    record = read_json(place / "out" / "run.json")
    assert record["metrics"]["final"]["loss"] < record["metrics"]["baseline"]["loss"]
    proof = record["stages"]["export"]["summary"]
    assert proof["tensors_checked"] == proof["tensors"]
    assert proof["merged_reloaded"]["relative_rms"] < 1e-2 < proof["in_four_bit"]["relative_rms"]
    assert "4-bit base" in (place / "out" / "merged" / "README.md").read_text()
    assert "4-bit base" in (place / "out" / "report.html").read_text()
    output = interrupted(place, tmp_path, 2)
    run("train", output, place / "cache", settings)
    assert digests(output) == digests(place / "out")
    assert checkpoints(output) == checkpoints(place / "out")


def test_sampled_answers_do_not_depend_on_what_ran_before_in_the_process(
    undisturbed: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(undisturbed / "out", tmp_path / "out"))
    sampled = {"eval.generation.do_sample": "true", "eval.baseline": "false"}
    predictions = output / "eval" / "predictions.jsonl"
    found = []
    for draws in (1, 7):
        torch.rand(draws)
        run("eval", output, tmp_path / "cache", sampled)
        found.append(predictions.read_text())
        (output / ".stages" / "eval.json").unlink()
    assert found[0] == found[1] != ""
