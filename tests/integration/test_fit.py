"""The trial of a step before the first one changes nothing of what is trained."""

from pathlib import Path

import pytest

from job.cli.app import app
from job.engines.device import Accelerator
from job.spec.types import JobSpec
from job.train import train
from tests.jobs import read_json, sets, small_run

SETTINGS = {
    "data.train.limit": 12,
    "train.per_device_train_batch_size": 4,
    "train.gradient_checkpointing": "true",
    "train.max_steps": 3,
    "lora.lora_dropout": 0.1,
}


def trained(output: Path) -> dict[str, str]:
    files = read_json(output / ".stages" / "train.json")["files"]
    return {f["path"]: f["sha256"] for f in files if f["path"].startswith("adapter/")}


@pytest.mark.slow
def test_a_trial_changes_nothing_in_what_is_trained(tmp_path: Path) -> None:
    for fit in ("on", "off"):
        given = sets({**SETTINGS, "train.fit": fit})
        app(
            ["train", *small_run(str(tmp_path / fit), *given, cache=tmp_path / "cache")[1:]],
            standalone_mode=False,
        )
    assert trained(tmp_path / "on") == trained(tmp_path / "off")
    tried, untried = (
        read_json(tmp_path / fit / "run.json")["stages"]["train"]["summary"]["fit"]
        for fit in ("on", "off")
    )
    assert untried is None
    assert tried == {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "too_large": [],
        "ruled_out": [],
    }


def test_the_peak_of_memory_is_that_of_training_and_not_of_a_trial_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int] = []

    def hungry(spec: JobSpec, accelerator: Accelerator, _: object) -> tuple[JobSpec, None]:
        tried = b"x" * 2**31
        del tried
        peaks.append(accelerator.peak_memory_bytes())
        return spec, None

    monkeypatch.setattr(train, "find_batch_size", hungry)
    given = small_run(str(tmp_path / "out"), *sets(SETTINGS), cache=tmp_path / "cache")
    app(["train", *given[1:]], standalone_mode=False)
    summary = read_json(tmp_path / "out" / "run.json")["stages"]["train"]["summary"]
    assert summary["peak_memory_bytes"] < peaks[0] - 2**30
