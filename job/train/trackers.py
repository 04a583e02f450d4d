"""Trackers: TensorBoard, MLflow and W&B, which Transformers feeds, wherever their files shall be.

They write to local folders. What they wrote is stored under a URI as it grows, and once more when
training ends, however it ends. MLflow and W&B write files only where no server is named.
"""

import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from job import log
from job.artifacts.writer import Writer
from job.errors import JobError, SpecError
from job.storage import retry

KEPT = ".keep"
EVERY_SECONDS = 30.0
"""How often what has grown is stored while training goes on."""


def require(report_to: Sequence[str]) -> None:
    """Raises SpecError for a tracker whose package is not installed."""
    for tracker in report_to:
        if importlib.util.find_spec(tracker) is None:
            raise SpecError(
                "$.train.report_to",
                f"the package {tracker} is not installed",
                value=tracker,
                fix='make setup EXTRAS="trackers", or build the image with EXTRAS="gpu trackers"',
            )


class TrackerFiles:
    """What the trackers of one training write: in `directory`, and under `uri`.

    `upload` stores a file at a path below `uri`: where that is in the output, under its lease.
    Without it no other job writes there.
    """

    def __init__(
        self,
        report_to: Sequence[str],
        directory: Path,
        uri: str,
        upload: Callable[[Path, str], None] | None = None,
    ) -> None:
        self._report_to, self._directory, self._uri = tuple(report_to), directory, uri
        self._upload = upload or Writer(uri, lease=None).upload
        self._stored: dict[Path, tuple[int, int]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="trackers", daemon=True)
        self._warned = False

    def point(self) -> None:
        """Tells the trackers where to write; what the user's environment says comes first.

        They ask for it when Trainer is made.
        """
        for name, value in self._settings().items():
            os.environ.setdefault(name, value)

    def __enter__(self) -> None:
        if not self._report_to:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        log.info("trackers", report_to=", ".join(self._report_to), files=self._uri)
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stores what is left. A store that fails is warned of: the training counts for more."""
        if not self._report_to:
            return
        self._closing.set()
        self._thread.join()
        _finish()
        if self._store():
            shutil.rmtree(self._directory, ignore_errors=True)

    def _settings(self) -> dict[str, str]:
        found = {}
        if "tensorboard" in self._report_to:
            found["TENSORBOARD_LOGGING_DIR"] = str(self._directory / "tensorboard")
        if "mlflow" in self._report_to and "MLFLOW_TRACKING_URI" not in os.environ:
            found["MLFLOW_TRACKING_URI"] = (self._directory / "mlflow").absolute().as_uri()
            # MLflow would have a database, which cannot be stored while it is written to.
            found["MLFLOW_ALLOW_FILE_STORE"] = "true"
        if "wandb" in self._report_to:
            found["WANDB_DIR"] = str(self._directory)
            # Lines of its own would break the structured ones.
            found |= {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
            # Its notes on the machine hold the command line, with whatever stands in that.
            found["WANDB_X_DISABLE_META"] = "true"
            if "WANDB_API_KEY" not in os.environ:
                found["WANDB_MODE"] = "offline"
        return found

    def _watch(self) -> None:
        while not self._closing.wait(EVERY_SECONDS):
            self._store()

    def _store(self) -> bool:
        """Stores the files that have changed; tells whether all are stored."""
        for path in sorted(self._directory.rglob("*")):
            if path.is_dir() and not any(path.iterdir()):
                # Object stores know no empty folders, and MLflow knows no run without all of its.
                path /= KEPT
                path.touch()
            if path.is_symlink() or not path.is_file():
                continue
            found = path.stat()
            mark = (found.st_size, found.st_mtime_ns)
            if self._stored.get(path) == mark:
                continue
            try:
                # A store that stays away must not hold up a job that was asked to stop.
                with retry.at_most(1):
                    self._upload(path, path.relative_to(self._directory).as_posix())
            except JobError as error:
                if not self._warned:
                    log.warn("the trackers' files could not be stored", reason=error)
                self._warned = True
                return False
            self._stored[path] = mark
        return True


def _finish() -> None:
    """W&B writes the end of a run when told, or when the interpreter ends, which is too late."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
