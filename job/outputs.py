"""What a run leaves at `output.uri`: stages published whole, records, checksums, `_SUCCESS`.

Every stage is made in a local folder and published file by file; its marker in `.stages/` comes
last and names every file with its digest. Without the marker nothing of the stage is believed.
Shards of weights go up before their stage is done, and come down again where it fails.
"""

import json
import shutil
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from job import log, storage
from job.early import Early
from job.errors import JobError, MissingInputError, StorageError
from job.lease import Lease
from job.local.work import WorkFolder
from job.manifest import (
    STAGES,
    FileDigest,
    RunRecord,
    StageRecord,
    digest_tree,
    download_verified,
    sha256_file,
)

LEASES = ".lease"
RUN, RESOLVED, SBOM = "run.json", "spec.resolved.yaml", "sbom.cdx.json"
SUMS, SUCCESS = "SHA256SUMS", "_SUCCESS"

# The folders whose files may be large enough for uploads in parts.
LARGE = ("data", "adapter", "weights", "merged", "checkpoints")

# The folders to which files of a stage go before it is done, and how those end that make up a
# checkpoint there: a killed job leaves some that no marker names.
EARLY = {"export": "merged"}
CHECKPOINT = (".json", ".safetensors")


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(kw_only=True)
class Output:
    """The output of one run, at `uri`, with its local working folder."""

    uri: str
    workdir: Path | WorkFolder
    run: RunRecord
    _local: set[str] = field(default_factory=set)
    _stale: dict[str, StageRecord | None] = field(default_factory=dict)
    _early: dict[str, Early] = field(default_factory=dict)
    holds_finished_run: bool = False
    """Whether an earlier run is there, whole: until this one opens, it is to stay as it is."""
    _sbom: str = ""

    def take(self) -> None:
        """Proves access to the output and takes its lease.

        Raises StorageError where another job is writing there.
        """
        storage.check_access(self.uri, "write")
        self._lease.acquire()
        self.holds_finished_run = storage.is_file(self.at(SUCCESS))
        self._abort_uploads()

    def describe(self, sbom: str) -> None:
        """Stores what the run is made with: first of all, so that a run that fails has it too."""
        self._sbom = sbom
        if not self.holds_finished_run:
            storage.write_text(self.at(SBOM), sbom)

    def open(self, resolved_spec: str) -> None:
        """Starts the run: `_SUCCESS` is withdrawn first, then the spec and `run.json` stored."""
        storage.delete(self.at(SUCCESS))
        if self.holds_finished_run:
            self.holds_finished_run = False
            self.describe(self._sbom)
        storage.write_text(self.at(RESOLVED), resolved_spec)
        self.save_run()

    @cached_property
    def _lease(self) -> Lease:
        return Lease(self.at(LEASES))

    @property
    def taken(self) -> bool:
        """Whether this run, and no other, may write at the output."""
        return self._lease.held

    def require(self) -> None:
        """Raises StorageError where another job has taken the output over."""
        self._lease.check()

    def release(self) -> None:
        """Lets other jobs have the output."""
        try:
            self._lease.release()
        except JobError as error:
            log.warn("the output's lease was not given up; it expires", reason=error)

    def _abort_uploads(self) -> None:
        try:
            count = storage.delete_unfinished(self.uri, LARGE)
        except JobError as error:  # some keys may not; a lifecycle rule does it too
            log.info("unfinished uploads were not looked for", reason=error)
        else:
            if count:
                log.info("unfinished uploads of a killed job removed", count=count)

    def at(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    def save_run(self) -> None:
        storage.write_text(self.at(RUN), self.run.to_text())

    def has_marker(self, name: str) -> bool:
        """Whether the stage was complete once, with whatever fingerprint."""
        return storage.is_file(self._marker(name))

    def completed(self, name: str, fingerprint: str) -> StageRecord | None:
        """The stage's record where it is complete with this fingerprint, else None."""
        record = self._marked(name)
        if record is None:
            return None
        if record.fingerprint != fingerprint:
            log.info("inputs changed; the stage runs again", stage=name)
            return None
        sizes = {entry.path: entry.size for entry in self._listing(record)}
        for file in record.files:
            if sizes.get(file.path) != file.size:
                log.warn(
                    "a file is missing or cut; the stage runs again", stage=name, file=file.path
                )
                return None
        return record

    def directory(self, name: str) -> Path:
        """An empty local folder for the stage to write into, as it will be under `uri`."""
        path = self.workdir / "stages" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def withdraw(self, name: str) -> None:
        """Removes the stage's marker before anything of it is written anew."""
        self._stale[name] = self._marked(name)
        storage.delete(self._marker(name))

    def send(self, name: str, path: Path) -> None:
        """Has a file of an unfinished stage stored in the background, under its final name.

        Before the first one goes what an earlier making left there, so that nobody reads of both.
        Raises what an earlier upload failed with, and StorageError where another job has taken the
        output over.
        """
        if name not in self._early:
            self.require()
            # What weights are loaded by goes before they do.
            for left in sorted(self._left(name), key=lambda path: path.endswith(".safetensors")):
                storage.delete(self.at(left))
            directory = self.workdir / "stages" / name
            self._early[name] = Early(directory, self.uri, self.require)
        self._early[name].send(path)

    def take_back(self, *, in_a_hurry: bool) -> None:
        """Removes what went up of a stage that was not finished."""
        for early in self._early.values():
            early.take_back(in_a_hurry=in_a_hurry)

    def publish(
        self, name: str, fingerprint: str, started: str, seconds: float, summary: dict[str, Any]
    ) -> StageRecord:
        """Uploads what of the stage's folder is not there yet, then its marker.

        Raises StorageError where another job has taken the output over, or a file changed after
        it went up.
        """
        self.require()
        directory = self.workdir / "stages" / name
        sent = self._early[name].finish() if name in self._early else {}
        files = digest_tree(directory)
        digests = {file.path: file.sha256 for file in files}
        for path, digest in sent.items():
            if digests.get(path) != digest:
                raise StorageError(
                    str(directory / path),
                    "is not what it was when it was uploaded",
                    fix="check the disk; run again",
                )
        storage.upload_tree(directory, self.uri, without=sent)
        for file in files:
            log.debug("stored", file=file.path, size=log.amount(file.size))
        record = StageRecord(
            name=name,
            fingerprint=fingerprint,
            started=started,
            seconds=round(seconds, 3),
            files=files,
            summary=summary,
        )
        self.require()  # it may have been lost while files went up
        # What an earlier making left and this one did not write again would mislead a reader.
        for path in self._left(name) - digests.keys():
            storage.delete(self.at(path))
        storage.write_text(self._marker(name), json.dumps(record.to_json(), indent=2) + "\n")
        self._early.pop(name, None)
        self._local.add(name)
        return record

    def publish_file(self, name: str, path: str) -> None:
        """Uploads one file of an unfinished stage, for people to see why it failed."""
        storage.upload(self.workdir / "stages" / name / path, self.at(path))

    def fetch(self, record: StageRecord) -> Path:
        """The stage's files in a local folder, downloaded and checked where they are not there.

        Raises StorageError where a file's digest is not the one that the marker names.
        """
        directory = self.workdir / "stages" / record.name
        if record.name in self._local:
            return directory
        if directory.is_dir() and digest_tree(directory) == record.files:
            return directory
        shutil.rmtree(directory, ignore_errors=True)
        for file in record.files:
            self._download(record, file)
        self._local.add(record.name)
        return directory

    def find_fetched(self, record: StageRecord) -> None:
        """Takes the stage's local files as another process of this machine has fetched them."""
        self._local.add(record.name)

    def fetch_file(self, record: StageRecord, path: str) -> Path:
        """One file of a stage, without the rest of it: weights may lie beside a few lines.

        Raises StorageError where its digest is not the one that the marker names.
        """
        [file] = [file for file in record.files if file.path == path]
        local = self.workdir / "stages" / record.name / path
        if not (local.is_file() and sha256_file(local) == file.sha256):
            self._download(record, file)
        return local

    def discard(self, name: str) -> None:
        """Removes what an earlier making of a withdrawn stage left: it is no longer true."""
        for path in self._left(name):
            storage.delete(self.at(path))

    def finish(self, *, complete: bool) -> None:
        """Writes the final `run.json`; then, for a complete run, `SHA256SUMS` and `_SUCCESS`.

        Raises StorageError where another job has taken the output over.
        """
        self.require()
        self.run.status, self.run.finished = "succeeded", utc_now()
        self.save_run()
        if not complete:
            return
        lines = sorted(
            f"{file.sha256}  {file.path}"
            for record in self.run.stages.values()
            for file in record.files
        )
        storage.write_text(self.at(SUMS), "\n".join(lines) + "\n")
        storage.write_text(self.at(SUCCESS), "")
        self.holds_finished_run = True  # whatever ends the process from here on, it stays whole

    def _marker(self, name: str) -> str:
        return self.at(STAGES, f"{name}.json")

    def _marked(self, name: str) -> StageRecord | None:
        """What the stage's marker says, whatever its fingerprint."""
        uri = self._marker(name)
        try:
            return StageRecord.from_json(json.loads(storage.read_bytes(uri)))
        except MissingInputError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.warn("stage marker unreadable; the stage runs again", stage=name, reason=error)
            return None

    def _left(self, name: str) -> set[str]:
        """What earlier makings of a withdrawn stage left at the output."""
        stale = self._stale.pop(name, None)
        left = {file.path for file in stale.files} if stale else set()
        if folder := EARLY.get(name):
            entries = storage.list_files(self.at(folder))
            left |= {f"{folder}/{e.path}" for e in entries if e.path.endswith(CHECKPOINT)}
        return left

    def _listing(self, record: StageRecord) -> tuple[storage.Entry, ...]:
        roots = sorted({file.path.split("/")[0] for file in record.files})
        entries: list[storage.Entry] = []
        for root in roots:
            uri = self.at(root)
            if storage.is_file(uri):
                entries.append(storage.Entry(path=root, size=storage.size(uri)))
            elif storage.exists(uri):
                entries += [
                    storage.Entry(path=f"{root}/{entry.path}", size=entry.size)
                    for entry in storage.list_files(uri)
                ]
        return tuple(entries)

    def _download(self, record: StageRecord, file: FileDigest) -> None:
        """A file of a stage, fetched again where other bytes arrive than were stored."""
        local = self.workdir / "stages" / record.name / file.path
        if not download_verified(self.uri, file.path, local, file.sha256):
            raise self._damaged(record, file.path)

    def _damaged(self, record: StageRecord, path: str) -> StorageError:
        return StorageError(
            self.at(path),
            "the file is not the one that the stage stored: its digest differs",
            fix=f"delete {STAGES}/{record.name}.json at the output to make it again",
        )
