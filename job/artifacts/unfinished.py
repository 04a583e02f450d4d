"""Which files a stage put at the output before it was done, by name.

A name is noted there before anything of the file is. So what a killed job left is known by its
names, and nothing else is ever removed: an output may hold files of its owner's beside a run's.
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
    """The files of stages that are being made, in `FOLDER/NAME.unfinished.json`."""

    def __init__(self, writer: Writer, folder: str) -> None:
        self._writer, self._folder = writer, folder
        self._named: dict[str, set[str]] = {}
        self._changing = threading.Lock()

    def begin(self, stage: str, before: Iterable[str]) -> None:
        """Notes the files that an earlier making left: those `before`, and what is noted."""
        noted = self._read(stage)
        self._named[stage] = set(noted)
        self.announce(stage, before)

    def announce(self, stage: str, paths: Iterable[str]) -> None:
        """Notes the files that a stage is about to store. Returns when that is stored."""
        with self._changing:
            named = self._named.setdefault(stage, set())
            if new := set(paths) - named:
                text = json.dumps({"files": sorted(named | new)}, indent=2) + "\n"
                self._writer.write_text(self._list(stage), text)
                named |= new

    def of(self, stage: str) -> frozenset[str]:
        """The files that this making of the stage, or an earlier one, may have stored."""
        return frozenset(self._named.get(stage, ()))

    def end(self, stage: str) -> None:
        """Forgets them: the stage's marker names those that stay."""
        self._writer.delete(self._list(stage))
        self._named.pop(stage, None)

    def _read(self, stage: str) -> set[str]:
        uri = self._writer.at(self._list(stage))
        try:
            found = json.loads(storage.read_text(uri))["files"]
            return {safe_relative(str(path), uri) for path in found}
        except MissingInputError:
            return set()
        except (ValueError, KeyError, TypeError) as error:
            log.warn("a list of unfinished files is unreadable, and passed over", reason=error)
            return set()

    def _list(self, stage: str) -> str:
        return f"{self._folder}/{stage}{SUFFIX}"
