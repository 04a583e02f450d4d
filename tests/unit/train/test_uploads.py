"""Checkpoints in the background: what runs beside training, what waits, what is raised when."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from job import signals, storage
from job.errors import StorageError, UsageError
from job.train.callbacks.checkpoint import CheckpointCallback
from job.train.checkpoint import state_files
from job.train.checkpoint.storage import MANIFEST, CheckpointStore
from job.train.checkpoint.uploads import BackgroundUploads

WAIT = 10.0  # seconds; only a defect waits as long


def test_training_goes_on_while_one_is_stored_and_one_waits() -> None:
    gate, stored = threading.Event(), list[int]()

    def store(step: int) -> None:
        assert gate.wait(WAIT)
        stored.append(step)

    with BackgroundUploads() as uploads:
        for step in (1, 2):
            uploads.submit(step, lambda step=step: store(step))  # type: ignore[misc]
        third = threading.Thread(target=lambda: uploads.submit(3, lambda: store(3)))
        third.start()
        third.join(0.2)
        assert third.is_alive(), "a third has to wait for a place"
        assert stored == []
        gate.set()
        third.join(WAIT)
    assert stored == [1, 2, 3]
    assert uploads.stored_step == 3


def test_an_urgent_one_takes_the_place_of_the_one_that_waits() -> None:
    gate, stored = threading.Event(), list[int]()

    def store(step: int) -> None:
        assert gate.wait(WAIT)
        stored.append(step)

    with BackgroundUploads() as uploads:
        for step in (1, 2, 3):
            uploads.submit(step, lambda step=step: store(step), urgent=step == 3)  # type: ignore[misc]
        gate.set()
    assert stored == [1, 3]


def test_a_failure_in_the_background_is_raised_at_the_next_check_once() -> None:
    def fail() -> None:
        raise StorageError("s3://bucket/checkpoints", "cannot write")

    uploads = BackgroundUploads()
    uploads.submit(1, fail)
    with pytest.raises(StorageError, match="cannot write"):
        uploads.finish()
    uploads.check()
    assert uploads.stored_step is None


def test_a_failure_in_the_background_does_not_hide_why_training_ended() -> None:
    def fail() -> None:
        raise StorageError("s3://bucket/checkpoints", "cannot write")

    def train() -> None:
        with BackgroundUploads() as uploads:
            uploads.submit(1, fail)
            raise MemoryError

    with pytest.raises(MemoryError):
        train()


def test_states_come_back_from_their_files_equal_in_value_and_type(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    state = {
        0: {"step": torch.tensor(3.0), "part": shared[:2], "rest": shared[2:]},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "fused": None, "amsgrad": False}],
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "python": (3, (1, 2**40), None),
        "numpy": np.array([2**32 - 1, 7], dtype=np.uint32),
    }
    state_files.save(state, tmp_path / "state")
    back = state_files.load(tmp_path / "state")
    assert back["groups"] == state["groups"]
    assert isinstance(back["groups"][0]["betas"], tuple)
    assert back["python"] == state["python"]
    assert back[0].keys() == {"step", "part", "rest"}
    assert torch.equal(back[0]["rest"], shared[2:])
    assert back["half"].dtype is torch.bfloat16
    assert back["numpy"].dtype == np.uint32
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_what_is_neither_a_tensor_nor_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.a\.0: a checkpoint cannot hold a PosixPath"):
        state_files.save({"a": [tmp_path]}, tmp_path / "state")


@pytest.mark.parametrize(("grace", "warned"), [("0", True), ("30", False)])
def test_a_grace_period_shorter_than_a_save_is_warned_about(
    grace: str,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(signals.GRACE_VARIABLE, grace)
    arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True)
    written = tmp_path / "trainer" / "checkpoint-3"
    written.mkdir(parents=True)
    (written / "trainer_state.json").write_text("{}")
    state = TrainerState(global_step=3, log_history=[{"step": 3, "loss": 2.5}])
    store = CheckpointStore(uri=str(tmp_path / "checkpoints"), fingerprint="f")
    with BackgroundUploads() as uploads:
        callback = CheckpointCallback(store, 2, uploads, lambda: None)
        control = TrainerControl(should_save=True)
        callback.on_step_end(arguments, state, control)
        callback.on_save(arguments, state, control)
    said = capsys.readouterr().err
    assert "checkpoint stored step=3 written=" in said
    assert ("longer than the grace period" in said) is warned
    assert ("terminationGracePeriodSeconds" in said) is warned


def test_the_loss_of_a_checkpoint_is_that_of_an_undisturbed_training_and_a_stop_s_has_none(
    tmp_path: Path,
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True)
    store = CheckpointStore(uri=str(tmp_path / "checkpoints"), fingerprint="f")
    state = TrainerState(max_steps=5, save_steps=2)
    for step, loss in ((2, 1.0), (3, 3.0), (4, 1.0), (5, 7.0)):
        (tmp_path / "trainer" / f"checkpoint-{step}").mkdir(parents=True)
        state.global_step = step
        state.log_history.append({"step": step, "loss": loss})
        with BackgroundUploads() as uploads:  # as if each were of another start
            callback = CheckpointCallback(store, 9, uploads, lambda: None)
            callback.on_save(arguments, state, TrainerControl())
    kept = {
        step: json.loads(storage.read_text(f"{store.at(step)}/{MANIFEST}")) for step in (2, 3, 4, 5)
    }
    assert {step: manifest["loss"] for step, manifest in kept.items()} == {
        2: 1.0,
        3: None,
        4: 2.0,
        5: 7.0,
    }


def test_a_job_that_lost_its_output_stores_no_checkpoint_and_removes_none(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True)
    written = tmp_path / "trainer" / "checkpoint-3"
    written.mkdir(parents=True)
    store = CheckpointStore(uri=str(tmp_path / "checkpoints"), fingerprint="f")
    (tmp_path / "another's").mkdir()
    for step in (1, 2, 3):
        store.save(tmp_path / "another's", step)

    def lost() -> None:
        raise StorageError("out", "another job has taken over the output")

    uploads = BackgroundUploads()
    callback = CheckpointCallback(store, 1, uploads, lost)
    callback.on_save(arguments, TrainerState(global_step=3), TrainerControl())
    with pytest.raises(StorageError, match="taken over the output"):
        uploads.finish()
    assert store.newest() == 3
    assert store.steps() == (1, 2, 3)


def test_a_grace_period_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signals.GRACE_VARIABLE, "soon")
    with pytest.raises(UsageError, match="JOB_GRACE_SECONDS: must be a number of seconds"):
        signals.grace_seconds()
