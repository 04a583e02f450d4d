"""Publishes stages to the output: first the files, last the marker.

A stage is written to a local folder and uploaded file by file; then its marker, which lists every
file with its digest. A stage without a marker is incomplete. Weight shards may be uploaded while
the stage still runs; they are deleted if it fails.

Only files named in the output's own records are deleted; so a file is added to the stage's list of
unfinished files before it is uploaded.
"""

from pathlib import Path
from typing import Any

from job import log, storage
from job.artifacts.eager_upload import EagerUploads
from job.artifacts.local_stages import LocalStages
from job.artifacts.markers import StageMarkers
from job.artifacts.records import STAGES, StageRecord
from job.artifacts.unfinished import SUFFIX, UnfinishedFiles
from job.artifacts.writer import SUCCESS, Writer
from job.errors import StorageError
from job.local.work_folder import WorkFolder
from job.storage.digests import TreeDigests

CHANGED = "inputs changed"


class StageStore:
    """The stages of the output at `uri`, which `writer` writes to."""

    def __init__(self, uri: str, writer: Writer, workdir: Path | WorkFolder) -> None:
        self._uri, self._writer = uri, writer
        self.local = LocalStages(uri, workdir)
        self.markers = StageMarkers(writer)
        self._unfinished = UnfinishedFiles(writer, STAGES)
        self._eager: dict[str, EagerUploads] = {}
        self.digests = TreeDigests()
        """Of the files in the folders of stages that this process runs."""

    # --- complete stages ---------------------------------------------------------------------

    def completed(self, name: str, fingerprint: str, *, quiet: bool = False) -> StageRecord | None:
        """The stage's record if it is complete with this fingerprint; else None, logging why."""
        record = self.markers.read(name)
        if record is None:
            return None
        problem = self._problem(record, fingerprint)
        if problem is None:
            return record
        if not quiet:
            say = log.info if problem == CHANGED else log.warn
            say(f"{problem}; the stage runs again", stage=name)
        return None

    def _problem(self, record: StageRecord, fingerprint: str) -> str | None:
        """Why a stage with a marker cannot be reused."""
        if record.fingerprint != fingerprint:
            return CHANGED
        sizes = {entry.path: entry.size for entry in self._list_files(record)}
        for file in record.files:
            if sizes.get(file.path) != file.size:
                return f"a file is missing or truncated: {file.path}"
        return None

    def _list_files(self, record: StageRecord) -> tuple[storage.Entry, ...]:
        """The files at the output in the folders of the stage."""
        roots = sorted({file.path.split("/")[0] for file in record.files})
        entries: list[storage.Entry] = []
        for root in roots:
            uri = storage.join(self._uri, root)
            if storage.is_file(uri):
                entries.append(storage.Entry(path=root, size=storage.size(uri)))
            elif storage.exists(uri):
                entries += [
                    storage.Entry(path=f"{root}/{entry.path}", size=entry.size)
                    for entry in storage.list_files(uri)
                ]
        return tuple(entries)

    # --- a stage that runs -------------------------------------------------------------------

    def invalidate(self, name: str) -> None:
        """Deletes the stage's marker, before any of its files is rewritten.

        First records the files that it names, so that those not written again are deleted.
        """
        record = self.markers.read(name)
        self._unfinished.begin(name, [file.path for file in record.files] if record else ())
        self.markers.delete(name)

    def upload_eagerly(self, name: str, path: Path) -> None:
        """Uploads a file of the running stage in the background, under its final name.

        Before the first one, deletes the files of an earlier run, so that nobody reads a mixture.
        Raises the error of an earlier upload, and LeaseLost if another job has taken over.
        """
        if name not in self._eager:
            self._writer.check_lease()
            # First the files that refer to the weights, then the weights.
            old = self._unfinished.of(name)
            for file in sorted(old, key=lambda path: path.endswith(".safetensors")):
                self._writer.delete(file)
            self._eager[name] = EagerUploads(
                self.local.path(name),
                self._writer,
                lambda file: self._unfinished.announce(name, [file]),
                self.digests,
            )
        self._eager[name].submit(path)

    def publish(
        self, name: str, fingerprint: str, started: str, seconds: float, summary: dict[str, Any]
    ) -> StageRecord:
        """Uploads the rest of the stage's files, then its marker.

        Raises LeaseLost if another job has taken over the output, and StorageError if a file
        changed after its upload.
        """
        self._writer.check_lease()
        folder = self.local.path(name)
        uploaded = self._eager[name].finish() if name in self._eager else {}
        files = self.digests.tree(folder)
        digests = {file.path: file.sha256 for file in files}
        for path, digest in uploaded.items():
            if digests.get(path) != digest:
                raise StorageError(
                    str(folder / path),
                    "changed after it was uploaded",
                    fix="check the disk; run again",
                )
        self._unfinished.announce(name, digests)
        self._writer.publish_tree(folder, without=uploaded)
        for file in files:
            log.debug("stored", file=file.path, size=log.byte_count(file.size))
        record = StageRecord(
            name=name,
            fingerprint=fingerprint,
            started=started,
            seconds=round(seconds, 3),
            files=files,
            summary=summary,
        )
        # Delete files of an earlier run that this one did not rewrite.
        for path in self._unfinished.of(name) - digests.keys():
            self._writer.delete(path)
        self.markers.write(record)
        self._unfinished.end(name)
        self._eager.pop(name, None)
        self.local.mark_complete(name)
        return record

    def publish_file(self, name: str, path: str) -> None:
        """Uploads one file of the running stage now, such as one that explains a failure."""
        self._unfinished.announce(name, [path])
        self._writer.upload(self.local.path(name) / path, path)

    # --- a stage that failed -----------------------------------------------------------------

    def roll_back(self, *, urgent: bool) -> None:
        """Deletes the eager uploads of unfinished stages."""
        for uploads in self._eager.values():
            uploads.roll_back(urgent=urgent)

    def discard(self, name: str) -> None:
        """Deletes the files that earlier runs of an invalidated stage left."""
        for path in self._unfinished.of(name):
            self._writer.delete(path)
        self._unfinished.end(name)

    def withdraw(self, name: str) -> None:
        """Deletes a complete stage: its marker, then its files."""
        if self.markers.exists(name):
            self.invalidate(name)
            self.discard(name)

    def invalidate_overwritten(self) -> None:
        """Invalidates stages with a file that another job overwrote in a late write."""
        for note, path in self._writer.overwritten().items():
            for name in self.markers.names():
                record = self.markers.read(name)
                if record is not None and path in {file.path for file in record.files}:
                    log.warn("a file was overwritten; its stage runs again", file=path)
                    self.invalidate(record.name)
            self._writer.delete(SUCCESS)
            self._writer.delete(note)

    def remove_leftovers(self, stages: dict[str, StageRecord]) -> None:
        """Deletes files that killed jobs left, except the files of `stages`."""
        current = {file.path for record in stages.values() for file in record.files}
        for entry in storage.list_files(storage.join(self._uri, STAGES)):
            name = entry.path.removesuffix(SUFFIX)
            if name == entry.path:
                continue
            self._unfinished.begin(name, ())
            if name not in stages:
                self.markers.delete(name)
            for path in sorted(self._unfinished.of(name) - current):
                self._writer.delete(path)
            self._unfinished.end(name)
