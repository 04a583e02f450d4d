"""The lease folder of an output: numbered files, the highest of which is the current lease."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from job import log, storage
from job.artifacts.lease_holder import LeaseHolder, process_state
from job.errors import MissingInputError, StorageError
from job.storage import local
from job.storage.uri import LEASE_LOCK_FILE

RENEWALS = 6
"""How often a lease is renewed within its duration."""


class LeaseHeld(StorageError):
    """A running job holds the lease."""

    title = "output in use"


@dataclass(frozen=True)
class LeaseFolder:
    """The leases at `uri`, each of which lasts `seconds` from its last renewal."""

    uri: str
    seconds: float

    @property
    def output(self) -> str:
        return storage.parent(self.uri)

    def at(self, number: int) -> str:
        return storage.join(self.uri, f"{number}.json")

    def numbers(self) -> tuple[int, ...]:
        names = (entry.path.removesuffix(".json") for entry in storage.list_files(self.uri))
        return tuple(int(name) for name in names if name.isdecimal())

    def read(self, number: int) -> LeaseHolder | None:
        """The holder of a lease; None if it was released after it was listed."""
        try:
            text = storage.read_bytes(self.at(number)).decode(errors="replace")
        except MissingInputError:
            return None
        return LeaseHolder.from_text(text)

    def current(self) -> tuple[int, LeaseHolder | None]:
        """The current lease's number and holder; zero and None if there is no lease."""
        number = max(self.numbers(), default=0)
        return number, self.read(number) if number else None

    def lock(self, *, exclusive: bool) -> AbstractContextManager[bool]:
        """On a local disk, a lock: shared by writes, exclusive for a takeover. Elsewhere False."""
        if not storage.is_local(self.uri):
            return nullcontext(False)
        path = storage.local_path(self.uri) / LEASE_LOCK_FILE
        return local.locked(path, exclusive=exclusive, seconds=self.seconds)

    def is_expired(
        self, number: int, holder: LeaseHolder, machine: str, *, quiet: bool = False
    ) -> bool:
        """Whether the holder is dead; False if the lease changed hands while being watched.

        `machine` identifies this machine; `quiet` logs no start of the watch. Raises LeaseHeld if
        the holder is running, and StorageError if it is suspended on this machine.
        """
        match process_state(holder, machine):
            case "dead":
                log.info("the job that held the output has died", process=holder.process)
                return True
            case "running":
                raise self.held_error(holder, "is running")
            case "stopped":
                error = self.held_error(holder, "is stopped", fix="continue it, or end it")
                raise StorageError.from_problems(error.problems)
            case "unknown":
                return self._expires(number, holder, quiet=quiet)

    def _expires(self, number: int, holder: LeaseHolder, *, quiet: bool) -> bool:
        """Like `is_expired`, by watching the lease until it would expire."""
        if not quiet:
            log.info(
                "another job holds the output; waiting to see whether it is alive",
                host=holder.host,
                since=holder.since,
                at_most=log.duration(self.seconds),
            )
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            time.sleep(self.seconds / RENEWALS / 4)
            number_now, holder_now = self.current()
            if number_now != number:
                return False
            if holder_now != holder:
                raise self.held_error(holder, "is running")
        log.warn("the lease of the job that held the output has expired", host=holder.host)
        return True

    def held_error(
        self,
        holder: LeaseHolder | None,
        reason: str,
        fix: str = "wait for it, stop it, or name another output",
    ) -> LeaseHeld:
        """The error for an output that another job holds, or held."""
        who = holder or "it has finished since"
        return LeaseHeld(self.output, f"another job {reason} ({who})", fix=fix)
