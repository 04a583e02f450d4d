"""Local copies of the stages: written by this run, or downloaded from the output."""

import shutil
from pathlib import Path

from job import storage
from job.artifacts.records import STAGES, StageRecord
from job.errors import StorageError
from job.local.work_folder import WorkFolder
from job.storage.digests import FileDigest, digest_tree, download_verified, sha256_file


class LocalStages:
    """A folder for each stage of the output at `uri`, below `workdir`."""

    def __init__(self, uri: str, workdir: Path | WorkFolder) -> None:
        self._uri, self._workdir = uri, workdir
        self._complete: set[str] = set()

    def path(self, name: str) -> Path:
        """The stage's folder, laid out as at the output."""
        return self._workdir / "stages" / name

    def create(self, name: str) -> Path:
        """An empty folder for the stage to write to."""
        path = self.path(name)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def mark_complete(self, name: str) -> None:
        """Marks the stage's files as verified, because this job wrote or downloaded them."""
        self._complete.add(name)

    def fetch(self, record: StageRecord) -> Path:
        """The stage's folder, downloaded and verified unless it is complete locally.

        Raises StorageError if a file's digest differs from that in the marker.
        """
        folder = self.path(record.name)
        if record.name in self._complete:
            return folder
        if folder.is_dir() and digest_tree(folder) == record.files:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        for file in record.files:
            self._download(record, file)
        self.mark_complete(record.name)
        return folder

    def fetch_file(self, record: StageRecord, path: str) -> Path:
        """One file of a stage, without the others, which may be large.

        Raises StorageError if its digest differs from that in the marker.
        """
        [file] = [file for file in record.files if file.path == path]
        local = self.path(record.name) / path
        if not (local.is_file() and sha256_file(local) == file.sha256):
            self._download(record, file)
        return local

    def _download(self, record: StageRecord, file: FileDigest) -> None:
        local = self.path(record.name) / file.path
        if not download_verified(self._uri, file.path, local, file.sha256):
            raise damaged(storage.join(self._uri, file.path), record)


def damaged(uri: str, record: StageRecord) -> StorageError:
    """The error for a stored file that differs from what the stage wrote."""
    return StorageError(
        uri,
        "the file differs from what the stage stored: its digest does not match",
        fix=f"delete {STAGES}/{record.name}.json at the output to rerun the stage",
    )
