"""A step that does not fit is divided before the first one, and trains the same."""

import re
import resource
from pathlib import Path

import pytest

from job.cli import app
from tests.jobs import read_json, sets, small_run, start

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
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "too_large": [],
    }


@pytest.mark.slow
def test_a_step_that_memory_does_not_hold_is_divided_until_it_does(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (3000 * 2**20, 3000 * 2**20))

    settings = {
        "train.per_device_train_batch_size": 600,
        "train.gradient_accumulation_steps": 1,
        "train.fit": "on",
        "data.train.limit": 600,
    }
    given = small_run(str(tmp_path / "out"), *sets(settings), cache=tmp_path / "cache")
    process = start("train", *given[1:], before=limit, environ={"OMP_NUM_THREADS": "1"})
    said = ""
    # What is left of so tight a limit need not do for the rest of the training.
    for line in process.stderr or ():
        said += line
        if "a step fits into memory" in line:
            break
    process.kill()
    process.wait()
    assert 'a step does not fit into memory tried="600 × 1' in said, said
    found = re.search(r'a step fits into memory tried="(\d+) × (\d+)', said)
    assert found is not None, said
    assert int(found[1]) < 600
    assert int(found[1]) * int(found[2]) == 600
