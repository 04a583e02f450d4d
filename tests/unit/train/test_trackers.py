"""Tracker files are uploaded as they grow, however the training ends."""

import os
from pathlib import Path

import pytest

from job import log, storage
from job.errors import SpecError
from job.train import trackers
from job.train.trackers import TrackerFiles


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TENSORBOARD_LOGGING_DIR", "MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the code under test sets
        monkeypatch.delenv(name)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path / "logs"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_files_are_stored_as_they_grow_and_at_the_end(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "memory://trackers/growing"
    monkeypatch.setattr(trackers, "UPLOAD_INTERVAL_SECONDS", 0.01)
    files = TrackerFiles(["tensorboard"], directory, uri)
    files.set_environment()
    with files:
        events = Path(os.environ["TENSORBOARD_LOGGING_DIR"]) / "events"
        write(events, "one")
        stored = f"{uri}/tensorboard/events"
        while not storage.exists(stored):
            pass
        monkeypatch.setattr(trackers, "UPLOAD_INTERVAL_SECONDS", 600)
        write(events, "one and two")
    assert storage.read_text(stored) == "one and two"
    assert not directory.exists()


def test_a_training_that_fails_leaves_its_trackers_files(directory: Path) -> None:
    uri = "memory://trackers/failed"

    def training() -> None:
        with TrackerFiles(["tensorboard"], directory, uri):
            write(directory / "tensorboard" / "events", "last words")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        training()
    assert storage.read_text(f"{uri}/tensorboard/events") == "last words"


def test_a_failed_upload_is_a_warning_and_the_files_stay(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("text")
    (tmp_path / "file").touch()
    with TrackerFiles(["tensorboard"], directory, f"{tmp_path}/file/logs"):
        write(directory / "tensorboard" / "events", "x")
    assert "the trackers' files could not be uploaded" in capsys.readouterr().err
    assert (directory / "tensorboard" / "events").read_text() == "x"


def test_an_empty_folder_is_kept(directory: Path) -> None:
    with TrackerFiles(["mlflow"], directory, "memory://trackers/empty"):
        (directory / "mlflow" / "artifacts").mkdir(parents=True)
    assert storage.exists("memory://trackers/empty/mlflow/artifacts/.keep")


def test_servers_that_the_user_names_take_precedence(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("WANDB_API_KEY", "planted-key")
    TrackerFiles(["mlflow", "wandb"], directory, "memory://trackers/servers").set_environment()
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "WANDB_MODE" not in os.environ


def test_without_trackers_nothing_happens(directory: Path) -> None:
    before = dict(os.environ)
    files = TrackerFiles([], directory, "memory://trackers/none")
    files.set_environment()
    with files:
        assert dict(os.environ) == before
        assert not directory.exists()


def test_a_tracker_that_is_not_installed_is_rejected_with_what_to_install() -> None:
    with pytest.raises(SpecError, match="no_such_tracker is not installed") as caught:
        trackers.require(["no_such_tracker"])
    assert "EXTRAS" in str(caught.value.problems[0].fix)
