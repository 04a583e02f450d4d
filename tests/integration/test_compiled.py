"""A training with compiled blocks, from its spec to its adapter."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from job.cli.app import app
from job.engines import compiling
from job.engines.fused_lora import FusedLora
from job.engines.trainer import StepTrainer
from job.errors import OutOfMemoryError
from tests.jobs import sets, small_run

SETTINGS = {
    "train.per_device_train_batch_size": 2,
    "train.max_steps": 3,
    "train.learning_rate": 1e-4,
    "train.fit": "on",
    "train.gradient_checkpointing": "false",
}


def train(output: Path, compiled: str, **more: object) -> None:
    given = sets({**SETTINGS, "train.torch_compile": compiled, **more})
    arguments = small_run(str(output), *given, cache=output.parent / "cache")
    app(["train", *arguments[1:]], standalone_mode=False)


def losses(output: Path) -> list[float]:
    lines = (output / "train" / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def names(output: Path, file: str) -> set[str]:
    return set(load_file(output / file))


@pytest.mark.slow(minutes=2)
def test_a_compiled_training_has_the_losses_and_the_names_of_one_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    train(plain, "false")
    train(compiled, "true")
    assert "blocks are compiled at their first call blocks=8" in capsys.readouterr().err
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    for file in ("adapter", "checkpoints/step-2"):
        weights = f"{file}/adapter_model.safetensors"
        assert names(compiled, weights) == names(plain, weights)


def test_a_full_gpu_is_not_asked_for_more_once_training_has_failed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("of no room")

    monkeypatch.setattr(compiling, "require", lambda _: None)  # no block gets as far
    monkeypatch.setattr(StepTrainer, "training_step", full)
    monkeypatch.setattr(FusedLora, "release", full)
    with pytest.raises(OutOfMemoryError, match="does not fit into") as refused:
        train(tmp_path / "out", "true", **{"train.fit": "off"})
    [problem] = refused.value.problems
    assert problem.field == "$.train.per_device_train_batch_size"
