"""A lease that lets one job at a time write to an output; its holder keeps renewing it.

The lease is the highest numbered file in a folder. A job takes it by creating the next number; if
the store has conditional puts (S3, local disks), only one of several jobs can succeed. If another
job holds the lease, the new job watches it: a holder that renews its lease is alive, and one that
has not done so for LEASE_SECONDS is dead. Clocks of different machines are never compared. If the
holder ran on this machine, its process is looked up, so that a restart after a crash need not wait.
A holder that is about to end is waited for (`lease_wait`).

A job that was suspended or disconnected for that long may continue after another has taken over.
So it checks its lease right before each write (`Lease.writing`). Nobody can take over within
LEASE_SECONDS of the last renewal, so the check is skipped for a fraction of that time. The gap
between check and write is closed in three ways:

- On a local disk, both happen under a shared file lock, which a takeover holds exclusively.
- S3 refuses the request if the object has changed since before the check.
- On other stores, the job checks again afterwards, and records what it overwrote (`LateWrite`).
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from job import log, signals, storage
from job.artifacts.lease_folder import RENEWALS, LeaseFolder
from job.artifacts.lease_holder import LeaseHolder, this_process
from job.artifacts.lease_wait import HolderWatch, LeaseWait
from job.errors import StorageError
from job.storage import retry

LEASE_SECONDS = 60.0
"""How long a lease lasts without a renewal."""
TRUSTED_FRACTION = 0.5
"""The fraction of that time after a renewal in which the holder writes without a check."""
RELEASE_SECONDS = 5.0
"""How long a release waits for a running renewal."""
ATTEMPTS = 5
"""How often to try to take a lease that changes hands or is not listed."""
SIGNAL_SECONDS = 0.5
"""How soon the lease says that its job was asked to stop."""


class LeaseLost(StorageError):
    """Another job has taken over the output."""


class LateWrite(LeaseLost):
    """A file was written after another job had taken over the output."""


class Lease:
    """The lease of an output, in the lease folder `uri`; a `storage.Guard` for the output's files.

    It lasts `seconds` after each renewal, by default LEASE_SECONDS.
    """

    def __init__(self, uri: str, seconds: float | None = None) -> None:
        self._seconds = LEASE_SECONDS if seconds is None else seconds
        self._folder = LeaseFolder(uri, self._seconds)
        self._me = this_process()
        self._number = 0
        self._lost = False
        self._confirmed = 0.0
        """When the last successful renewal began."""
        self._released = threading.Event()
        self._checking = threading.Lock()
        """Keeps this job from reading its own half-written renewal."""
        self._renewal: threading.Thread | None = None
        self.conditions = storage.Conditions()

    # --- holding it --------------------------------------------------------------------------

    def acquire(self, wait: LeaseWait | None = None) -> None:
        """Takes the lease and starts renewing it.

        Raises StorageError if a running job holds it, for longer than `wait` allows, or if the
        store does not list files that were just stored.
        """
        uri = self._folder.uri
        if storage.is_local(uri):
            path = storage.local_path(uri)
            retry.call("write", uri, lambda: path.mkdir(parents=True, exist_ok=True))
        self.conditions = storage.conditions(uri)
        watch = HolderWatch(self._folder, wait or LeaseWait())
        for _ in range(ATTEMPTS):
            number, holder = self._folder.current()
            if holder is not None:
                holder = watch.until_dead(number, holder, self._me.machine)
                if holder is None:
                    log.info("the output's lease changed hands; trying again", output=self._output)
                    continue
            if self._take(number, holder):
                break
        else:
            raise StorageError(
                self._output,
                "its lease cannot be taken: the store does not list it, or it keeps changing hands",
                fix="write the URI without empty, . or .. parts, or name an output that no other "
                "job starts on",
            )
        self._renewal = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewal.start()

    @property
    def fence(self) -> str:
        """The fencing token, which identifies this acquisition of the lease."""
        return f"{self._number}-{self._me.id}"

    @property
    def held(self) -> bool:
        """Whether this job holds the lease, as of its last check."""
        return self._number > 0 and not self._lost

    def release(self) -> None:
        """Releases the lease, if held."""
        self._released.set()
        if self._renewal is not None:  # it could recreate what is deleted here
            self._renewal.join(RELEASE_SECONDS)
        if not self.held:
            return
        try:
            with self._checking:
                for number in sorted(self._folder.numbers()):
                    if number <= self._number:
                        storage.delete(self._folder.at(number), _LeaseFileGuard(self))
        except LeaseLost:
            return
        self._number = 0

    # --- writing under it --------------------------------------------------------------------

    def check(self) -> None:
        """Raises LeaseLost if another job has taken the lease."""
        self._require_acquired()
        with self._checking:
            holder = self._read_holder()
        if self._lost:
            raise self._lost_error(holder)

    def ensure(self) -> None:
        """Like `check`, but skips the check shortly after a renewal."""
        self._require_acquired()
        if self._lost or self._age() > TRUSTED_FRACTION * self._seconds:
            self.check()

    @contextmanager
    def writing(self, uri: str, *, conditional: bool = False) -> Iterator[None]:
        """Allows one file at the output to be written or deleted.

        Raises LeaseLost before the write if another job has taken over, or LateWrite after it if
        another job took over during the write and the store still accepted it.
        """
        with self._folder.lock(exclusive=False) as locked:
            if locked:
                self.check()
            else:
                self.ensure()
            try:
                yield
            finally:
                if not (locked or conditional) and self._age() > self._seconds:
                    self._check_after_write()

    def _check_after_write(self) -> None:
        try:
            self.check()
        except LeaseLost as error:
            raise LateWrite.from_problems(error.problems) from error

    def _require_acquired(self) -> None:
        if not self._number:
            raise StorageError(
                self._output,
                "nothing is written without the output's lease, which this job does not hold",
                fix="acquire the output first",
            )

    # --- taking and renewing it --------------------------------------------------------------

    def _take(self, number: int, seen: LeaseHolder | None) -> bool:
        """Creates the lease after `number`, unless that one changed since `seen` was read."""
        folder, started = self._folder, _now()
        mine = folder.at(number + 1)
        try:
            with folder.lock(exclusive=True):
                if folder.current() != (number, seen):
                    return False
                if not storage.write_new(mine, self._me.to_text().encode()):
                    return False
                # Without a lock, a renewal may have been in flight. If the holder released the
                # lease meanwhile, it deleted the lower numbers, and this must be the only one.
                moved = seen is not None and folder.read(number) not in (seen, None)
                if moved or max(folder.numbers(), default=0) != number + 1:
                    storage.delete(mine)
                    return False
        except TimeoutError:
            raise folder.held_error(
                seen, "is suspended in the middle of a write", fix="continue it, or end it"
            ) from None
        self._number, self._confirmed = number + 1, started
        return True

    def _renew(self) -> None:
        mine = self._me
        with retry.abandoned_if_set(self._released):
            while self._wait_for_renewal(stopping=mine.stopping):
                stopping = signals.received() is not None
                mine = replace(mine, renewed=mine.renewed + 1, stopping=stopping)
                started, guard = _now(), _LeaseFileGuard(self)
                try:
                    with self._checking:
                        storage.write_text(self._folder.at(self._number), mine.to_text(), guard)
                        self._confirm(started, atomic=guard.atomic)
                except retry.Abandoned:
                    return
                except LeaseLost as error:
                    log.warn(
                        "this job has lost its output's lease and writes nothing more there",
                        reason=error,
                    )
                    return
                except Exception as error:  # noqa: BLE001 - a lease without renewals is lost
                    log.warn("the output's lease could not be renewed", reason=error)

    def _wait_for_renewal(self, *, stopping: bool) -> bool:
        """Whether it is time for a renewal: at once after a signal; False once released."""
        due = _now() + self._seconds / RENEWALS
        while (left := due - _now()) > 0:
            if self._released.wait(min(left, SIGNAL_SECONDS)):
                return False
            if signals.received() is not None and not stopping:
                break
        return not self._released.is_set()

    def _confirm(self, started: float, *, atomic: bool) -> None:
        """Records a renewal. A late one may have raced with a takeover, so the lease is read again.

        If the write was not atomic, another job may have taken and released the lease in between;
        then the lease counts as lost.
        """
        if self._age() > self._seconds:
            holder = self._read_holder()
            if not atomic and not self._lost:
                self._lost = True
                storage.delete(self._folder.at(self._number))
            if self._lost:
                raise self._lost_error(holder)
        self._confirmed = started

    def _read_holder(self) -> LeaseHolder | None:
        """The current holder; marks the lease as lost if that is not this job.

        The number alone proves nothing: numbers start again after a release.
        """
        number, holder = self._folder.current()
        if number != self._number or holder is None or holder.id != self._me.id:
            self._lost = True
        return holder

    def _lost_error(self, holder: LeaseHolder | None) -> LeaseLost:
        error = self._folder.held_error(holder, "has taken over the output")
        return LeaseLost.from_problems(error.problems)

    def _age(self) -> float:
        return _now() - self._confirmed

    @property
    def _output(self) -> str:
        return self._folder.output


class _LeaseFileGuard:
    """The guard of the lease file itself: checks before each write and records if it was atomic."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self.atomic = False

    @property
    def conditions(self) -> storage.Conditions:
        return self._lease.conditions

    def ensure(self) -> None:
        pass

    @contextmanager
    def writing(self, uri: str, *, conditional: bool = False) -> Iterator[None]:
        with self._lease._folder.lock(exclusive=False) as locked:
            self.atomic = locked or conditional
            holder = self._lease._read_holder()
            if self._lease._lost:
                raise self._lease._lost_error(holder)
            yield


def _now() -> float:
    """Seconds on a clock that keeps running while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
