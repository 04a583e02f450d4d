"""Records the names of an unfinished stage's files at the output.

A name is recorded before its file is uploaded, so that files of a killed job are known. Nothing
else is ever deleted: an output may also contain files of the user.
"""

import json
import threading
from collections.abc import Iterable

from job import log, storage
from job.artifacts.writer import Writer
from job.errors import MissingInputError
from job.storage.uri import safe_relative

SUFFIX = ".unfinished.json"


class UnfinishedFiles:
    """The files of unfinished stages, recorded in `FOLDER/NAME.unfinished.json`."""

    def __init__(self, writer: Writer, folder: str) -> None:
        self._writer, self._folder = writer, folder
        self._files: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def begin(self, stage: str, before: Iterable[str]) -> None:
        """Starts the record of a stage with the files in `before` and those recorded earlier."""
        recorded = self._read(stage)
        self._files[stage] = set(recorded)
        self.announce(stage, before)

    def announce(self, stage: str, paths: Iterable[str]) -> None:
        """Records files before the stage uploads them; returns once the record is stored."""
        with self._lock:
            files = self._files.setdefault(stage, set())
            if new := set(paths) - files:
                text = json.dumps({"files": sorted(files | new)}, indent=2) + "\n"
                self._writer.write_text(self._path(stage), text)
                files |= new

    def of(self, stage: str) -> frozenset[str]:
        """The files that this or an earlier run of the stage may have uploaded."""
        return frozenset(self._files.get(stage, ()))

    def end(self, stage: str) -> None:
        """Deletes the record; the stage's marker names its files now."""
        self._writer.delete(self._path(stage))
        self._files.pop(stage, None)

    def _read(self, stage: str) -> set[str]:
        uri = self._writer.at(self._path(stage))
        try:
            files = storage.parse_json(storage.read_text(uri))["files"]
            return {safe_relative(str(path), uri) for path in files}
        except MissingInputError:
            return set()
        except (ValueError, KeyError, TypeError) as error:
            log.warn("list of unfinished files unreadable; ignored", stage=stage, reason=error)
            return set()

    def _path(self, stage: str) -> str:
        return f"{self._folder}/{stage}{SUFFIX}"
