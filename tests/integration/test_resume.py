"""A training that was interrupted ends as one that was not: the same losses, the same adapter."""

import json
import shutil
from pathlib import Path

import pytest

from job.cli import app
from job.train.checkpoints import MANIFEST
from tests.jobs import FULL, read_json, small_run

# Three batches an epoch, steps logged in pairs, and dropout: what a resume can get wrong.
SETTINGS = {
    "data.train.limit": 24,
    "train.max_steps": 8,
    "train.save_steps": 3,
    "train.logging_steps": 2,
    "train.save_total_limit": 5,
    "lora.lora_dropout": 0.1,
}
COMPARED = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def train(output: Path, cache: Path, **settings: object) -> None:
    values = {**SETTINGS, **settings}
    given = [f"{key}={value}" for key, value in values.items() if value is not None]
    sets = [item for each in given for item in ("--set", each)]
    app(["train", *small_run(str(output), *sets, cache=cache)[1:]], standalone_mode=False)


def history(output: Path) -> list[dict[str, float]]:
    lines = (output / "train" / "history.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in COMPARED} for line in lines]


def digests(output: Path) -> dict[str, str]:
    files = read_json(output / ".stages" / "train.json")["files"]
    return {f["path"]: f["sha256"] for f in files if f["path"].startswith(("adapter/", "weights/"))}


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


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_training_is_bit_equal_to_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    output = interrupted(undisturbed, tmp_path, step)
    train(output, tmp_path / "cache")
    assert f"resuming step={step}" in capsys.readouterr().err
    assert history(output) == history(undisturbed / "out")
    assert digests(output) == digests(undisturbed / "out")
    tokens = [
        read_json(each / "run.json")["stages"]["train"]["summary"]["tokens"]
        for each in (output, undisturbed / "out")
    ]
    assert tokens[0] == tokens[1] > 0


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


def test_a_resumed_full_fine_tuning_is_bit_equal_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = {**FULL, "lora.lora_dropout": None}
    train(tmp_path / "out", tmp_path / "cache", **full)
    output = interrupted(tmp_path, tmp_path / "again", 6)
    train(output, tmp_path / "cache", **full)
    assert "resuming step=6" in capsys.readouterr().err
    assert history(output) == history(tmp_path / "out")
    assert any(path.startswith("weights/") for path in digests(output))
    assert digests(output) == digests(tmp_path / "out")
