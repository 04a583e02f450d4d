"""The one way in which anything at an output is written or removed: under its lease.

`Writer` makes sure of the lease right before each write, each delete and each part of an upload
(`job.artifacts.lease`), and is of no use once another job has taken the output over. Nothing else
in this project writes at an output; `tests/unit/artifacts/test_writer.py` holds that.
"""

import json
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from job import log, storage
from job.artifacts.lease import Lease, Slipped
from job.errors import JobError
from job.storage.uri import safe_relative

LEASES, SUCCESS = ".lease", "_SUCCESS"
_OVERWRITTEN = "overwritten-"
"""How notes in the lease's folder begin that name a file which was written too late."""


class Writer:
    """Writes at `root`, or in the folder `below` it, under the lease of `root`.

    Every method raises TakenOver, with nothing written, if the output is another job's by now;
    paths are relative to the folder. A `storage.Guard` for what it hands to `storage`.
    """

    def __init__(self, root: str, lease: Lease | None, below: str = "") -> None:
        """Without a lease, for a place that no other job writes to."""
        self._root, self._lease, self._below = root, lease, below

    def inside(self, *parts: str) -> "Writer":
        """A writer for a folder in this one."""
        return Writer(self._root, self._lease, storage.join(self._below, *parts).lstrip("/"))

    def at(self, path: str) -> str:
        """The URI of a file in the folder."""
        return storage.join(self._root, self._below, path)

    def write_text(self, path: str, text: str) -> None:
        storage.write_text(self.at(path), text, guard=self)

    def upload(self, file: Path, path: str) -> None:
        storage.upload(file, self.at(path), guard=self)

    def upload_tree(self, directory: Path, *, without: Collection[str] = ()) -> None:
        storage.upload_tree(directory, self.at(""), without=without, guard=self)

    def delete(self, path: str) -> None:
        self.ensure()  # also where nothing is there
        storage.delete(self.at(path), guard=self)

    def delete_tree(self, path: str) -> None:
        self.ensure()
        storage.delete_tree(self.at(path), guard=self)

    def delete_unfinished(self, below: Collection[str]) -> int:
        """Removes what killed uploads to the folders `below` left unseen; tells how many."""
        return storage.delete_unfinished(self.at(""), below, guard=self)

    # --- as a guard --------------------------------------------------------------------------

    @property
    def conditions(self) -> storage.Conditions:
        return storage.Conditions() if self._lease is None else self._lease.conditions

    def ensure(self) -> None:
        if self._lease is not None:
            self._lease.ensure()

    @contextmanager
    def writing(self, uri: str, *, conditional: bool = False) -> Iterator[None]:
        if self._lease is None:
            yield
            return
        try:
            with self._lease.writing(uri, conditional=conditional):
                yield
        except Slipped:
            self._tell_slipped(uri)
            raise

    def _tell_slipped(self, uri: str) -> None:
        """Says that a file of the other job's was written over, and makes its run unfinished.

        The note goes first: whoever writes `_SUCCESS` looks for notes afterwards, so that one of
        the two sees the other. Only this is written without the lease.
        """
        path = uri.removeprefix(storage.join(self._root, "x")[:-1])
        log.error(
            "a file was written in the moment in which another job took the output over",
            file=path,
            fix=f"run that other job again: {SUCCESS} is withdrawn",
        )
        try:
            note = storage.join(self._root, LEASES, f"{_OVERWRITTEN}{secrets.token_hex(8)}.json")
            storage.write_text(note, json.dumps({"file": path}) + "\n")
            storage.delete(storage.join(self._root, SUCCESS))
        except JobError as error:
            log.error("that could not be noted at the output", file=path, reason=error)

    def overwritten(self) -> dict[str, str]:
        """The files that another job says it wrote over, by the path of its note."""
        folder = storage.join(self._root, LEASES)
        found = {}
        for entry in storage.list_files(folder):
            if entry.path.startswith(_OVERWRITTEN):
                text = storage.read_text(storage.join(folder, entry.path))
                path = json.loads(text)["file"]
                found[f"{LEASES}/{entry.path}"] = safe_relative(path, folder)
        return found
