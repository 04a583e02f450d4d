"""A step that does not fit is divided before the first one, and trains the same."""

import resource
from pathlib import Path

import pytest

from job.cli import app
from tests.jobs import job, read_json, sets, small_run

SETTINGS = {
    "data.train.limit": 12,
    "train.per_device_train_batch_size": 2,
    "train.gradient_accumulation_steps": 2,
    "train.gradient_checkpointing": "true",
    "train.max_steps": 3,
    "lora.lora_dropout": 0.1,
}


def trained(output: Path) -> dict[str, str]:
    files = read_json(output / ".stages" / "train.json")["files"]
    return {f["path"]: f["sha256"] for f in files if f["path"].startswith("adapter/")}


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
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "too_large": [],
    }


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_divided_and_trained(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2600 * 2**20, 2600 * 2**20))

    settings = {
        "train.per_device_train_batch_size": 600,
        "train.gradient_accumulation_steps": 1,
        "train.max_steps": 1,
        "train.fit": "on",
        "data.train.limit": 600,
    }
    given = small_run(str(tmp_path / "out"), *sets(settings), cache=tmp_path / "cache")
    done = job("train", *given[1:], before=limit, environ={"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done.err
    assert "a step does not fit into memory" in done.err
    summary = read_json(tmp_path / "out" / "run.json")["stages"]["train"]["summary"]
    fit = summary["fit"]
    assert fit["too_large"][0]["per_device_train_batch_size"] == 600
    assert fit["per_device_train_batch_size"] < 600
    assert fit["per_device_train_batch_size"] * fit["gradient_accumulation_steps"] == 600
    assert summary["rows_a_step"] == 600
