"""What a run leaves at `output.uri`: stages published whole, records, checksums, `_SUCCESS`.

Every stage is made in a local folder and published file by file; its marker in `.stages/` comes
last and names every file with its digest. Without the marker nothing of the stage is believed.
Shards of weights go up before their stage is done, and come down again where it fails.

All of it goes through `job.artifacts.writer`, under the lease. Only files that this output's own
records name are removed: a file's name is in the stage's list of unfinished files before the file
goes up.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from job import log, storage
from job.artifacts.eager_upload import Early
from job.artifacts.lease import Lease
from job.artifacts.nesting import RESOLVED, RUN, refuse_nested
from job.artifacts.records import STAGES, RunRecord, StageRecord
from job.artifacts.unfinished import SUFFIX, UnfinishedFiles
from job.artifacts.writer import LEASES, SUCCESS, Writer
from job.errors import JobError, MissingInputError, StorageError
from job.local.work_folder import WorkFolder
from job.spec.rules.locations import canonical
from job.storage.digests import FileDigest, digest_tree, download_verified, sha256_file

__all__ = ["LEASES", "RESOLVED", "RUN", "SBOM", "STAGES", "SUCCESS", "SUMS", "Output", "utc_now"]

CHANGED = "inputs changed"
SBOM, SUMS = "sbom.cdx.json", "SHA256SUMS"

# The folders whose files may be large enough for uploads in parts.
LARGE = ("data", "adapter", "weights", "merged", "checkpoints")


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(kw_only=True)
class Output:
    """The output of one run, at `uri`, with its local working folder."""

    uri: str
    workdir: Path | WorkFolder
    run: RunRecord
    _local: set[str] = field(default_factory=set)
    _early: dict[str, Early] = field(default_factory=dict)
    holds_finished_run: bool = False
    """Whether an earlier run is there, whole: until this one opens, it is to stay as it is."""
    _sbom: str = ""
    _resolved: str = ""

    def take(self) -> None:
        """Proves access to the output and takes its lease.

        Raises StorageError where another job is writing there, SpecError where it lies in the
        output of another run.
        """
        refuse_nested(self.uri)
        storage.check_access(self.uri, "write")
        self._lease.acquire()
        self._distrust_overwritten()
        self.holds_finished_run = storage.is_file(self.at(SUCCESS))
        self._abort_uploads()

    def describe(self, sbom: str) -> None:
        """Stores what the run is made with: first of all, so that a run that fails has it too."""
        self._sbom = sbom
        if not self.holds_finished_run:
            self.writer.write_text(SBOM, sbom)

    def open(self, resolved_spec: str) -> None:
        """Starts the run: stores its spec and `run.json`; a finished run stays as it is for now."""
        self._resolved = resolved_spec
        if not self.holds_finished_run:
            self.writer.write_text(RESOLVED, resolved_spec)
            self.save_run()

    def reopen(self, reason: str) -> None:
        """Withdraws `_SUCCESS` of a finished run, and says so, before any of it changes."""
        if not self.holds_finished_run:
            return
        log.info(f"the run was finished; {SUCCESS} is withdrawn until it is again", reason=reason)
        self.writer.delete(SUCCESS)
        self.holds_finished_run = False
        self.describe(self._sbom)
        self.open(self._resolved)

    @cached_property
    def writer(self) -> Writer:
        """The one way to write at the output, or to remove anything there."""
        return Writer(self.uri, self._lease)

    def uploads_to(self, uri: str) -> Callable[[Path, str], None]:
        """What stores a file at a path below `uri`: under the lease where that is in the output."""
        root, folder = canonical(self.uri), canonical(uri)
        if folder != root and not folder.startswith(f"{root}/"):
            return Writer(uri, lease=None).upload
        return self.writer.inside(folder.removeprefix(root)).upload

    @cached_property
    def _unfinished(self) -> UnfinishedFiles:
        return UnfinishedFiles(self.writer, STAGES)

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
            count = self.writer.delete_unfinished(LARGE)
        except JobError as error:  # some keys may not; a lifecycle rule does it too
            log.info("unfinished uploads were not looked for", reason=error)
        else:
            if count:
                log.info("unfinished uploads of a killed job removed", count=count)

    def at(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    def save_run(self) -> None:
        """Stores `run.json`, but not over a finished run's."""
        if not self.holds_finished_run:
            self.writer.write_text(RUN, self.run.to_text())

    def has_marker(self, name: str) -> bool:
        """Whether the stage was complete once, with whatever fingerprint."""
        return storage.is_file(self.at(self._marker(name)))

    def completed(self, name: str, fingerprint: str) -> StageRecord | None:
        """The stage's record where it is complete with this fingerprint, else None and says why."""
        record, problem = self._whole(name, fingerprint)
        if problem == CHANGED:
            log.info(f"{problem}; the stage runs again", stage=name)
        elif problem is not None:
            log.warn(f"{problem}; the stage runs again", stage=name)
        return record

    def found_complete(self, name: str, fingerprint: str) -> StageRecord | None:
        """As `completed`, without a word: for a stage that is not to be made now."""
        return self._whole(name, fingerprint)[0]

    def _whole(self, name: str, fingerprint: str) -> tuple[StageRecord | None, str | None]:
        """The record of a stage that is complete; else None, and why not where it once was."""
        record = self._marked(name)
        if record is None:
            return None, None
        if record.fingerprint != fingerprint:
            return None, CHANGED
        sizes = {entry.path: entry.size for entry in self._listing(record)}
        for file in record.files:
            if sizes.get(file.path) != file.size:
                return None, f"a file is missing or cut: {file.path}"
        return record, None

    def directory(self, name: str) -> Path:
        """An empty local folder for the stage to write into, as it will be under `uri`."""
        path = self.workdir / "stages" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def withdraw(self, name: str) -> None:
        """Removes the stage's marker before anything of it is written anew.

        The files that it names are noted first: some may not be written again, and go then.
        """
        marked = self._marked(name)
        self._unfinished.begin(name, [file.path for file in marked.files] if marked else ())
        self.writer.delete(self._marker(name))

    def send(self, name: str, path: Path) -> None:
        """Has a file of an unfinished stage stored in the background, under its final name.

        Before the first one goes what an earlier making left there, so that nobody reads of both.
        Raises what an earlier upload failed with, and StorageError where another job has taken the
        output over.
        """
        if name not in self._early:
            self.require()
            # What weights are loaded by goes before they do.
            left = self._unfinished.of(name)
            for each in sorted(left, key=lambda path: path.endswith(".safetensors")):
                self.writer.delete(each)
            self._early[name] = Early(
                self.workdir / "stages" / name,
                self.writer,
                lambda each: self._unfinished.announce(name, [each]),
            )
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
        self._unfinished.announce(name, digests)
        self.writer.upload_tree(directory, without=sent)
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
        # What an earlier making left and this one did not write again would mislead a reader.
        for path in self._unfinished.of(name) - digests.keys():
            self.writer.delete(path)
        text = json.dumps(record.to_json(), indent=2) + "\n"
        self.writer.write_text(self._marker(name), text)
        self._unfinished.end(name)
        self._early.pop(name, None)
        self._local.add(name)
        return record

    def publish_file(self, name: str, path: str) -> None:
        """Uploads one file of an unfinished stage, for people to see why it failed."""
        self._unfinished.announce(name, [path])
        self.writer.upload(self.workdir / "stages" / name / path, path)

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
        for path in self._unfinished.of(name):
            self.writer.delete(path)
        self._unfinished.end(name)

    def finish(self, *, complete: bool) -> None:
        """Writes the final `run.json`; then, for a complete run, `SHA256SUMS` and `_SUCCESS`.

        A finished run in which nothing was made keeps both as they are; and its `run.json`, unless
        this run is as complete. `_SUCCESS` holds the digest of `SHA256SUMS`, and which holding of
        the lease wrote it.
        Raises StorageError where another job has taken the output over.
        """
        self.require()
        self.run.status, self.run.finished = "succeeded", utc_now()
        if not complete:
            self.save_run()
            return
        lines = sorted(
            f"{file.sha256}  {file.path}"
            for record in self.run.stages.values()
            for file in record.files
        )
        sums = "\n".join(lines) + "\n"
        if self.holds_finished_run and self._read(SUMS) != sums:
            self.reopen("other files belong to it")
        self._drop_unfinished()
        self.writer.write_text(RUN, self.run.to_text())
        if not self.holds_finished_run:
            self.writer.write_text(SUMS, sums)
            digest = hashlib.sha256(sums.encode()).hexdigest()
            success = {"sha256sums": digest, "lease": self._lease.fence}
            self.writer.write_text(SUCCESS, json.dumps(success) + "\n")
        for path in self.writer.overwritten().values():
            self.writer.delete(SUCCESS)
            raise StorageError(
                self.at(path),
                "another job wrote over it when this one took the output over",
                fix="run again: the stage that it belongs to is made anew",
            )
        self.holds_finished_run = True  # whatever ends the process from here on, it stays whole

    def _drop_unfinished(self) -> None:
        """Removes what killed makings left of stages that are no part of the run any more."""
        kept = {file.path for record in self.run.stages.values() for file in record.files}
        for entry in storage.list_files(self.at(STAGES)):
            name = entry.path.removesuffix(SUFFIX)
            if name == entry.path:
                continue
            self._unfinished.begin(name, ())
            if name not in self.run.stages:
                self.writer.delete(self._marker(name))
            for path in sorted(self._unfinished.of(name) - kept):
                self.writer.delete(path)
            self._unfinished.end(name)

    def _read(self, path: str) -> str | None:
        try:
            return storage.read_text(self.at(path))
        except MissingInputError:
            return None

    def _distrust_overwritten(self) -> None:
        """Has stages made again of which another job, too late, wrote over a file."""
        for note, path in self.writer.overwritten().items():
            for entry in storage.list_files(self.at(STAGES)):
                if entry.path.endswith(SUFFIX):
                    continue
                record = self._marked(entry.path.removesuffix(".json"))
                if record is not None and path in {file.path for file in record.files}:
                    log.warn("a file was written over; its stage runs again", file=path)
                    self.withdraw(record.name)
            self.writer.delete(SUCCESS)
            self.writer.delete(note)

    def _marker(self, name: str) -> str:
        return f"{STAGES}/{name}.json"

    def _marked(self, name: str) -> StageRecord | None:
        """What the stage's marker says, whatever its fingerprint."""
        uri = self.at(self._marker(name))
        try:
            return StageRecord.from_json(json.loads(storage.read_bytes(uri)))
        except MissingInputError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.warn("stage marker unreadable; the stage runs again", stage=name, reason=error)
            return None

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
