"""Uploads files of a stage while the stage still runs, and deletes them if it fails.

Only files that are useless by themselves are uploaded eagerly: weight shards, without the
configuration and index, which follow when the stage is done.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from job import log
from job.artifacts.writer import Writer
from job.errors import JobError
from job.storage import retry, trees
from job.storage.background import BackgroundTasks
from job.storage.digests import TreeDigests

STOP_SECONDS = 1.0
"""How long a rollback waits for running uploads if the job was asked to stop."""
FAILURE_SECONDS = 60.0
"""The same after a failure."""


class EagerUploads:
    """Uploads files below `directory` to the same paths at the output, several at a time.

    `announce` is called with each path before any of the file is uploaded.
    """

    def __init__(
        self,
        directory: Path,
        writer: Writer,
        announce: Callable[[str], None],
        digests: TreeDigests,
    ) -> None:
        self._directory, self._writer, self._announce = directory, writer, announce
        self._file_digests = digests
        self._tasks = BackgroundTasks("eager upload", threads=trees.FILES_AT_ONCE)
        self._stop = threading.Event()
        self._started: list[str] = []
        self._digests: dict[str, str] = {}

    def submit(self, path: Path) -> None:
        """Uploads the file in the background. Raises the error of an earlier upload.

        Does nothing after a rollback: the stage may keep running after another thread abandoned it.
        """
        if self._stop.is_set():
            return
        relative = path.relative_to(self._directory).as_posix()
        self._tasks.submit(partial(self._upload, path, relative))

    def finish(self) -> Mapping[str, str]:
        """Waits for all uploads; returns each file's SHA-256 from before its upload."""
        self._tasks.finish()
        return self._digests

    def roll_back(self, *, urgent: bool) -> None:
        """Cancels the uploads and deletes the uploaded files, as far as possible.

        The next run of the stage deletes the rest, since their names are recorded at the output.
        """
        self._stop.set()
        self._tasks.abandon(STOP_SECONDS if urgent else FAILURE_SECONDS)
        try:
            with retry.at_most(1):
                for relative in self._started:
                    self._writer.delete(relative)
        except JobError as error:
            log.warn("files of an unfinished stage could not be removed", reason=error)
        else:
            if self._started:
                log.info("files of the unfinished stage removed", files=len(self._started))

    def _upload(self, path: Path, relative: str) -> None:
        with retry.abandoned_if_set(self._stop):
            self._writer.ensure()
            digest = self._file_digests.sha256(path)
            self._announce(relative)
            self._started.append(relative)
            self._writer.publish(path, relative)
        self._digests[relative] = digest
        log.debug("uploaded eagerly", file=relative, size=log.byte_count(path.stat().st_size))
