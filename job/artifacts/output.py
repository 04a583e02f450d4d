"""The output of a run, `output.uri`: its lease, `run.json`, checksums and `_SUCCESS`.

Its stages are in `job.artifacts.stage_store`. Everything is written by `job.artifacts.writer`,
under the lease.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from job import log, storage
from job.artifacts.lease import Lease
from job.artifacts.nesting import RESOLVED, RUN, refuse_nested
from job.artifacts.records import STAGES, RunRecord
from job.artifacts.stage_store import StageStore
from job.artifacts.writer import LEASES, SUCCESS, Writer
from job.errors import JobError, MissingInputError, StorageError
from job.local.process_identity import utc_now
from job.local.work_folder import WorkFolder
from job.spec.rules.locations import canonical

__all__ = ["LEASES", "RESOLVED", "RUN", "SBOM", "STAGES", "SUCCESS", "SUMS", "Output"]

SBOM, SUMS = "sbom.cdx.json", "SHA256SUMS"

# The folders whose files may be large enough for multipart uploads.
LARGE = ("data", "adapter", "weights", "merged", "checkpoints")


@dataclass(kw_only=True)
class Output:
    """The output of one run, at `uri`, with its local working folder."""

    uri: str
    workdir: Path | WorkFolder
    run: RunRecord
    holds_finished_run: bool = False
    """Whether a complete earlier run is there: it stays unchanged until this one reopens it."""
    _sbom: str = ""
    _resolved_spec: str = ""

    def at(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    # --- the lease ---------------------------------------------------------------------------

    def acquire(self) -> None:
        """Checks access to the output and takes its lease.

        Raises StorageError if another job is writing there, and SpecError if it lies in the output
        of another run.
        """
        refuse_nested(self.uri)
        storage.check_access(self.uri, "write")
        self._lease.acquire()
        self.stages.invalidate_overwritten()
        self.holds_finished_run = storage.is_file(self.at(SUCCESS))
        self._abort_uploads()

    @property
    def lease_held(self) -> bool:
        """Whether this job, and no other, may write at the output."""
        return self._lease.held

    def check_lease(self) -> None:
        """Raises LeaseLost if another job has taken over the output."""
        self._lease.check()

    def release(self) -> None:
        """Gives up the lease."""
        try:
            self._lease.release()
        except JobError as error:
            log.warn("the output's lease could not be released; it will expire", reason=error)

    @cached_property
    def _lease(self) -> Lease:
        return Lease(self.at(LEASES))

    def _abort_uploads(self) -> None:
        try:
            count = self.writer.delete_unfinished(LARGE)
        except JobError as error:  # not every key is allowed to; a lifecycle rule does it too
            log.info("unfinished multipart uploads could not be listed", reason=error)
        else:
            if count:
                log.info("unfinished uploads of a killed job removed", count=count)

    # --- what is written there ---------------------------------------------------------------

    @cached_property
    def writer(self) -> Writer:
        """The only way to write or delete anything at the output."""
        return Writer(self.uri, self._lease)

    @cached_property
    def stages(self) -> StageStore:
        return StageStore(self.uri, self.writer, self.workdir)

    def uploader_for(self, uri: str) -> Callable[[Path, str], None]:
        """Uploads a file to a path below `uri`: under the lease if that is in the output."""
        root, folder = canonical(self.uri), canonical(uri)
        if folder != root and not folder.startswith(f"{root}/"):
            return Writer(uri, lease=None).upload
        return self.writer.inside(folder.removeprefix(root)).upload

    def write_sbom(self, sbom: str) -> None:
        """Stores the SBOM: first of all, so that a run that fails has it too."""
        self._sbom = sbom
        if not self.holds_finished_run:
            self.writer.write_text(SBOM, sbom)

    def start_run(self, resolved_spec: str) -> None:
        """Stores the spec and `run.json`, unless a finished run is there."""
        self._resolved_spec = resolved_spec
        if not self.holds_finished_run:
            self.writer.write_text(RESOLVED, resolved_spec)
            self.save_run()

    def reopen_run(self, reason: str) -> None:
        """Withdraws `_SUCCESS` of a finished run, with a message, before any of it changes."""
        if not self.holds_finished_run:
            return
        log.info(f"the run was finished; {SUCCESS} is withdrawn until it is again", reason=reason)
        self.writer.delete(SUCCESS)
        self.holds_finished_run = False
        self.write_sbom(self._sbom)
        self.start_run(self._resolved_spec)

    def save_run(self) -> None:
        """Stores `run.json`, but not over that of a finished run."""
        if not self.holds_finished_run:
            self.writer.write_text(RUN, self.run.to_text())

    def finish_run(self, *, complete: bool) -> None:
        """Writes the final `run.json`; then, for a complete run, `SHA256SUMS` and `_SUCCESS`.

        A finished run in which no stage ran keeps both as they are; also its `run.json`, unless
        this run is as complete. `_SUCCESS` holds the digest of `SHA256SUMS` and the fencing token
        of the lease under which it was written. Raises LeaseLost if another job has taken over.
        """
        self.check_lease()
        self.run.status, self.run.finished = "succeeded", utc_now()
        if not complete:
            self.save_run()
            return
        sums = self._checksums()
        if self.holds_finished_run and self._read(SUMS) != sums:
            self.reopen_run("its files changed")
        self.stages.remove_leftovers(self.run.stages)
        self.writer.write_text(RUN, self.run.to_text())
        if not self.holds_finished_run:
            self.writer.write_text(SUMS, sums)
            digest = hashlib.sha256(sums.encode()).hexdigest()
            success = {"sha256sums": digest, "lease": self._lease.fence}
            self.writer.write_text(SUCCESS, json.dumps(success) + "\n")
        self._require_not_overwritten()
        self.holds_finished_run = True  # it stays complete, however the process ends from here on

    def _checksums(self) -> str:
        lines = sorted(
            f"{file.sha256}  {file.path}"
            for record in self.run.stages.values()
            for file in record.files
        )
        return "\n".join(lines) + "\n"

    def _require_not_overwritten(self) -> None:
        for path in self.writer.overwritten().values():
            self.writer.delete(SUCCESS)
            raise StorageError(
                self.at(path),
                "another job wrote over it when this one took the output over",
                fix="run again: its stage is rerun",
            )

    def _read(self, path: str) -> str | None:
        try:
            return storage.read_text(self.at(path))
        except MissingInputError:
            return None
