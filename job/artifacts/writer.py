"""Writes and deletes files at an output, under its lease.

`Writer` checks the lease right before each write, each delete and each part of an upload
(`job.artifacts.lease`). No other code in this project writes to an output;
`tests/unit/artifacts/test_writer.py` enforces that.
"""

import json
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from job import log, storage
from job.artifacts.lease import LateWrite, Lease
from job.errors import JobError
from job.storage.uri import safe_relative

LEASES, SUCCESS = ".lease", "_SUCCESS"
_OVERWRITTEN = "overwritten-"
"""Prefix of the files in the lease folder that report a late write."""


class Writer:
    """Writes to `root`, or the folder `below` it, under the lease of `root`.

    Every method raises LeaseLost, and writes nothing, if another job has taken over the output.
    Paths are relative to the folder. Also the `storage.Guard` of its own writes.
    """

    def __init__(self, root: str, lease: Lease | None, below: str = "") -> None:
        """`lease` is None for a location that no other job writes to."""
        self._root, self._lease, self._below = root, lease, below

    def inside(self, *parts: str) -> "Writer":
        """A writer for a folder in this one."""
        return Writer(self._root, self._lease, storage.join(self._below, *parts).lstrip("/"))

    def at(self, path: str) -> str:
        """The URI of a file in the folder."""
        return storage.join(self._root, self._below, path)

    def check_lease(self) -> None:
        """Raises LeaseLost if another job has taken over; call it before a long operation."""
        if self._lease is not None:
            self._lease.check()

    def write_text(self, path: str, text: str) -> None:
        storage.write_text(self.at(path), text, guard=self)

    def upload(self, file: Path, path: str) -> None:
        storage.upload(file, self.at(path), guard=self)

    def upload_tree(self, directory: Path, *, without: Collection[str] = ()) -> None:
        storage.upload_tree(directory, self.at(""), without=without, guard=self)

    def publish(self, file: Path, path: str) -> None:
        """Uploads a file that nobody changes any more, see `storage.upload`."""
        storage.upload(file, self.at(path), guard=self, final=True)

    def publish_tree(self, directory: Path, *, without: Collection[str] = ()) -> None:
        """Uploads files that nobody changes any more."""
        storage.upload_tree(directory, self.at(""), without=without, guard=self, final=True)

    def delete(self, path: str) -> None:
        self.ensure()  # also if there is nothing to delete
        storage.delete(self.at(path), guard=self)

    def delete_tree(self, path: str) -> None:
        self.ensure()
        storage.delete_tree(self.at(path), guard=self)

    def delete_unfinished(self, below: Collection[str]) -> int:
        """Deletes unfinished uploads of killed jobs to the folders `below`; returns how many."""
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
        except LateWrite:
            self._report_late_write(uri)
            raise

    def _report_late_write(self, uri: str) -> None:
        """Reports that a file of the other job was overwritten, and deletes its `_SUCCESS`.

        The report is written first: a job that writes `_SUCCESS` looks for reports afterwards, so
        one of the two jobs notices. These are the only writes without the lease.
        """
        path = uri.removeprefix(storage.join(self._root, "x")[:-1])
        log.error(
            "a file was written while another job took over the output",
            file=path,
            fix=f"run that other job again: its {SUCCESS} was removed",
        )
        try:
            note = storage.join(self._root, LEASES, f"{_OVERWRITTEN}{secrets.token_hex(8)}.json")
            storage.write_text(note, json.dumps({"file": path}) + "\n")
            storage.delete(storage.join(self._root, SUCCESS))
        except JobError as error:
            log.error("the late write could not be recorded", file=path, reason=error)

    def overwritten(self) -> dict[str, str]:
        """The files that other jobs reported to have overwritten, by path of the report."""
        folder = storage.join(self._root, LEASES)
        files = {}
        for entry in storage.list_files(folder):
            if entry.path.startswith(_OVERWRITTEN):
                text = storage.read_text(storage.join(folder, entry.path))
                path = json.loads(text)["file"]
                files[f"{LEASES}/{entry.path}"] = safe_relative(path, folder)
        return files
