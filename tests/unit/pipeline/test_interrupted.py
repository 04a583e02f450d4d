"""What a stopped run says that it leaves."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from job.errors import StorageError
from job.pipeline.interrupted import LOOKUP_SECONDS, describe_kept, same_command
from job.train.checkpoint.storage import MANIFEST, CheckpointStore


def store_with(directory: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(uri=str(directory / "checkpoints"), fingerprint="this")
    (directory / "files").mkdir()
    for step in steps:
        store.save(directory / "files", step)
    return store


def test_the_newest_checkpoint_is_the_newest_that_is_whole_and_of_this_training(
    tmp_path: Path,
) -> None:
    store = store_with(tmp_path, 2, 4, 6)
    other = CheckpointStore(uri=store.uri, fingerprint="another")
    other.save(tmp_path / "files", 8)
    (Path(store.at(6)) / MANIFEST).unlink()
    assert describe_kept(["prep"], store) == f"stage prep; checkpoint {store.at(4)}"


def test_without_a_checkpoint_the_stages_are_told(tmp_path: Path) -> None:
    assert describe_kept(["prep", "baseline"], store_with(tmp_path)) == "stages prep, baseline"


class Hangs(CheckpointStore):
    def newest(self) -> int | None:
        threading.Event().wait(60)
        return 1


class Fails(CheckpointStore):
    def newest(self) -> int | None:
        raise StorageError(self.uri, "does not answer")


def test_a_store_that_hangs_or_fails_does_not_hold_up_who_has_to_leave() -> None:
    for kind in (Hangs, Fails):
        began = time.monotonic()
        assert describe_kept(["prep"], kind(uri="memory://x", fingerprint="this")) == "stage prep"
        assert time.monotonic() - began < LOOKUP_SECONDS + 30  # of 60


def test_one_process_is_started_again_by_its_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "job", "run", "a b.yaml"])
    assert same_command() == "python -m job run 'a b.yaml'"


@pytest.mark.parametrize(
    ("local", "more"), [("2", ""), ("1", ", and as before on the other nodes")]
)
def test_several_processes_are_started_again_by_their_launcher(
    monkeypatch: pytest.MonkeyPatch, local: str, more: str
) -> None:
    """One process would take fewer rows a step, which is another training."""
    given = ["run", "a b.yaml", "--set", "name=x"]
    waits = "input(1)"
    command = [sys.executable, "-c", waits, "--nproc-per-node", local, "-m", "job", *given]
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    try:
        assert launcher.stdout.read(1) == b"1"  # its command line can be read
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        monkeypatch.setattr(sys, "argv", ["job", *given])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "job", *given])
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        job = "-m job run 'a b.yaml' --set name=x"
        assert same_command() == f"python -u {job}, in 2 processes again"
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        shown = f"{sys.executable} -c '{waits}' --nproc-per-node {local} {job}{more}"
        assert same_command() == shown
    finally:
        launcher.kill()
        launcher.wait()
