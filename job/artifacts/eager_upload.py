"""Files of a stage that go up while it is still being made, and come down again where it fails.

Only what nobody can use by itself may go so: a shard of weights without the configuration and the
index, which follow when the stage is done.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from job import log
from job.artifacts.writer import Writer
from job.errors import JobError
from job.storage import retry, trees
from job.storage.background import Background
from job.storage.digests import sha256_file

LAST_SECONDS = 1.0
"""How long taking back waits for uploads under way, where the job was asked to stop."""
PATIENCE_SECONDS = 60.0
"""The same, where it failed."""


class Early:
    """Uploads of files below `directory` to the same places at the output, a few at once.

    `announce` is told of each path before anything of it goes up.
    """

    def __init__(self, directory: Path, writer: Writer, announce: Callable[[str], None]) -> None:
        self._directory, self._writer, self._announce = directory, writer, announce
        self._uploads = Background("early", threads=trees.FILES_AT_ONCE)
        self._stop = threading.Event()
        self._begun: list[str] = []
        self._stored: dict[str, str] = {}

    def send(self, path: Path) -> None:
        """Has the file stored in the background. Raises what an earlier one failed with.

        Once what went up is taken back nothing follows it: the work may go on where another thread
        has given it up.
        """
        if self._stop.is_set():
            return
        relative = path.relative_to(self._directory).as_posix()
        self._uploads.submit(partial(self._store, path, relative))

    def finish(self) -> Mapping[str, str]:
        """Waits until all are stored; the SHA-256 that each file had before it went up."""
        self._uploads.finish()
        return self._stored

    def take_back(self, *, in_a_hurry: bool) -> None:
        """Ends the uploads and removes what went up, as far as the store lets it.

        What stays is removed when the stage is made again: its names are written down.
        """
        self._stop.set()
        self._uploads.abandon(LAST_SECONDS if in_a_hurry else PATIENCE_SECONDS)
        try:
            with retry.at_most(1):
                for relative in self._begun:
                    self._writer.delete(relative)
        except JobError as error:
            log.warn("what went up of an unfinished stage could not be removed", reason=error)
        else:
            if self._begun:
                log.info("what went up of the unfinished stage is removed", files=len(self._begun))

    def _store(self, path: Path, relative: str) -> None:
        with retry.abandoned_with(self._stop):
            self._writer.ensure()
            digest = sha256_file(path)
            self._announce(relative)
            self._begun.append(relative)
            self._writer.upload(path, relative)
        self._stored[relative] = digest
        log.debug("stored early", file=relative, size=log.amount(path.stat().st_size))
