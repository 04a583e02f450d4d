"""The output of a run, `output.uri`: its lease, `run.json`, checksums and `_SUCCESS`.

`job.artifacts.stage_store` handles the stages. All writes go through `job.artifacts.writer`, under
the lease.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from job import log, storage
from job.artifacts.lease import Lease
from job.artifacts.lease_wait import LeaseWait
from job.artifacts.nesting import RESOLVED, RUN, refuse_nested
from job.artifacts.records import STAGES, RunRecord
from job.artifacts.stage_store import StageStore
from job.artifacts.writer import LEASES, SUCCESS, Writer
from job.errors import JobError, MissingInputError, StorageError
from job.local.process_identity import utc_now
from job.local.work_folder import WorkFolder
from job.spec.output_folders import ADAPTER, MERGED, REINFORCED, WEIGHTS
from job.spec.rules.locations import canonical

__all__ = ["LEASES", "RESOLVED", "RUN", "SBOM", "STAGES", "SUCCESS", "SUMS", "Output"]

SBOM, SUMS = "sbom.cdx.json", "SHA256SUMS"

# The folders whose files may be large enough for multipart uploads.
LARGE = ("data", ADAPTER, WEIGHTS, REINFORCED, MERGED, "checkpoints")


@dataclass(kw_only=True)
class Output:
    """The output of one run, at `uri`, with its local working folder."""

    uri: str
    workdir: Path | WorkFolder
    run: RunRecord
    holds_finished_run: bool = False
    """Whether the output holds a finished run, which stays unchanged until this one reopens it."""
    _sbom: str = ""
    _resolved_spec: str = ""

    def at(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    # --- the lease ---------------------------------------------------------------------------

    def acquire(self, wait: LeaseWait | None = None) -> None:
        """Checks access to the output and takes its lease.

        Raises StorageError if another job is writing there, for longer than `wait` allows, and
        SpecError if it is inside the output of another run.
        """
        refuse_nested(self.uri)
        storage.check_access(self.uri, "write")
        self._lease.acquire(wait)
        self.stages.invalidate_overwritten()
        self.holds_finished_run = storage.is_file(self.at(SUCCESS))
        self._abort_uploads()

    @property
    def lease_held(self) -> bool:
        """Whether this job holds the lease, and so may write to the output."""
        return self._lease.held

    def check_lease(self) -> None:
        """Raises LeaseLost if another job has taken over the output."""
        self._lease.check()

    def release(self) -> None:
        """Releases the lease; a failure is a warning."""
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
        except (
            JobError
        ) as error:  # the keys may lack the permission; a lifecycle rule can do it too
            log.info("unfinished multipart uploads could not be listed", reason=error)
        else:
            if count:
                log.info("unfinished uploads of a killed job removed", count=count)

    # --- what is written there ---------------------------------------------------------------

    @cached_property
    def writer(self) -> Writer:
        """The only way to write or delete files at the output."""
        return Writer(self.uri, self._lease)

    @cached_property
    def stages(self) -> StageStore:
        return StageStore(self.uri, self.writer, self.workdir)

    def uploader_for(self, uri: str) -> Callable[[Path, str], None]:
        """A function that uploads a file below `uri`, under the lease if it is in the output."""
        root, folder = canonical(self.uri), canonical(uri)
        if folder != root and not folder.startswith(f"{root}/"):
            return Writer(uri, lease=None).upload
        return self.writer.inside(folder.removeprefix(root)).upload

    def write_sbom(self, sbom: str) -> None:
        """Stores the SBOM, before anything else, so that failed runs have one too."""
        self._sbom = sbom
        if not self.holds_finished_run:
            self.writer.write_text(SBOM, sbom)

    def start_run(self, resolved_spec: str) -> None:
        """Stores the spec and `run.json`, unless the output holds a finished run."""
        self._resolved_spec = resolved_spec
        if not self.holds_finished_run:
            self.writer.write_text(RESOLVED, resolved_spec)
            self.save_run()

    def reopen_run(self, reason: str) -> None:
        """Deletes `_SUCCESS` of a finished run, and logs why, before anything changes."""
        if not self.holds_finished_run:
            return
        log.info(
            f"{SUCCESS} of the finished run is removed until it is finished again", reason=reason
        )
        self.writer.delete(SUCCESS)
        self.holds_finished_run = False
        self.write_sbom(self._sbom)
        self.start_run(self._resolved_spec)

    def save_run(self) -> None:
        """Stores `run.json`, unless the output holds a finished run."""
        if not self.holds_finished_run:
            self.writer.write_text(RUN, self.run.to_text())

    def finish_run(self, *, complete: bool) -> None:
        """Writes the final `run.json`; then, for a complete run, `SHA256SUMS` and `_SUCCESS`.

        If the output holds a finished run and no stage ran, keeps both, and also `run.json` unless
        this run is complete. `_SUCCESS` contains the digest of `SHA256SUMS` and the fencing token
        of the lease under which it was written. Raises LeaseLost if another job has taken over.
        """
        self.check_lease()
        self.run.status, self.run.finished = "succeeded", utc_now()
        if not complete:
            self.save_run()
            return
        sums = self._checksums()
        if self.holds_finished_run and self._read(SUMS) != sums.encode():
            self.reopen_run("its files changed")
        self.stages.remove_leftovers(self.run.stages)
        self.writer.write_text(RUN, self.run.to_text())
        if not self.holds_finished_run:
            self.writer.write_text(SUMS, sums)
            digest = hashlib.sha256(sums.encode()).hexdigest()
            success = {"sha256sums": digest, "lease": self._lease.fence}
            self.writer.write_text(SUCCESS, json.dumps(success) + "\n")
        self._require_not_overwritten()
        self.holds_finished_run = True  # complete, however the process ends from here on

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
                "another job wrote over it when this one took over the output",
                fix="run again: its stage is rerun",
            )

    def _read(self, path: str) -> bytes | None:
        try:
            return storage.read_bytes(self.at(path))
        except MissingInputError:
            return None
