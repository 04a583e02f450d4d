"""What a stopped run says that it leaves."""

import threading
import time
from pathlib import Path

from job.errors import StorageError
from job.pipeline.interrupted import LOOKUP_SECONDS, describe_kept
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
