"""Uploads the files of experiment trackers (TensorBoard, MLflow, W&B) to a URI.

Transformers' callbacks write them to a local folder, which is uploaded periodically, and once more
when training ends, even if it fails. MLflow and W&B write files only if no server is configured.
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

KEEP_FILE = ".keep"
UPLOAD_INTERVAL_SECONDS = 30.0
"""How often new content is uploaded during training."""


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
    """The tracker files of one training, in `directory` and under `uri`.

    `upload` stores a file at a path below `uri`, under the output's lease if `uri` is in the
    output. By default, files are written without a lease.
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

    def set_environment(self) -> None:
        """Sets the trackers' environment variables; those that the user has set take precedence.

        Must be called before the Trainer is built, which reads them.
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
        """Uploads what is left. A failure only warns: it must not fail the training."""
        if not self._report_to:
            return
        self._closing.set()
        self._thread.join()
        _finish_wandb()
        if self._store():
            shutil.rmtree(self._directory, ignore_errors=True)

    def _settings(self) -> dict[str, str]:
        settings = {}
        if "tensorboard" in self._report_to:
            settings["TENSORBOARD_LOGGING_DIR"] = str(self._directory / "tensorboard")
        if "mlflow" in self._report_to and "MLFLOW_TRACKING_URI" not in os.environ:
            settings["MLFLOW_TRACKING_URI"] = (self._directory / "mlflow").absolute().as_uri()
            # The default, a database, cannot be uploaded while it is written.
            settings["MLFLOW_ALLOW_FILE_STORE"] = "true"
        if "wandb" in self._report_to:
            settings["WANDB_DIR"] = str(self._directory)
            # Its output would break the structured log.
            settings |= {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
            # Its metadata holds the command line, with any secret in it.
            settings["WANDB_X_DISABLE_META"] = "true"
            if "WANDB_API_KEY" not in os.environ:
                settings["WANDB_MODE"] = "offline"
        return settings

    def _watch(self) -> None:
        while not self._closing.wait(UPLOAD_INTERVAL_SECONDS):
            self._store()

    def _store(self) -> bool:
        """Uploads the files that have changed; returns whether all are uploaded."""
        for path in sorted(self._directory.rglob("*")):
            if path.is_dir() and not any(path.iterdir()):
                # Object stores have no empty folders, but MLflow needs all of a run's folders.
                path /= KEEP_FILE
                path.touch()
            if path.is_symlink() or not path.is_file():
                continue
            stat = path.stat()
            version = (stat.st_size, stat.st_mtime_ns)
            if self._stored.get(path) == version:
                continue
            try:
                # An unavailable store must not hold up a job that was asked to stop.
                with retry.at_most(1):
                    self._upload(path, path.relative_to(self._directory).as_posix())
            except JobError as error:
                if not self._warned:
                    log.warn("the trackers' files could not be uploaded", reason=error)
                self._warned = True
                return False
            self._stored[path] = version
        return True


def _finish_wandb() -> None:
    """Ends a W&B run; otherwise it ends with the interpreter, after the last upload."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
