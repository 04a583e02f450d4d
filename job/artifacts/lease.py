"""One job at a time on an output: a lease that its holder renews and that a dead one loses.

The lease is the highest numbered file in a folder. It is taken by creating the next number, which
only one of several can do where the store has conditional puts (S3, local disks). Whoever finds a
holder watches it: one that renews its lease is alive, and one that does not for LEASE_SECONDS is
dead. No clock is compared with another machine's. A holder that ran on this machine is looked up
among its processes, so that a restart after a crash need not wait.

A job that was stopped or cut off for so long may go on when another has taken over. So it makes
sure of its lease right before each thing that it writes (`Lease.writing`). Nobody can take over
earlier than LEASE_SECONDS after the last renewal: well before that it need not look. What happens
between the look and the write is closed in three ways:

- On a local disk both are made under a shared lock of a file that a takeover locks for itself.
- S3 refuses what was sent if the object has changed since before the look.
- Elsewhere the job looks once more afterwards, and says what it wrote over (`Slipped`).
"""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from job import log, storage
from job.artifacts.lease_holder import Holder, life, myself
from job.errors import MissingInputError, StorageError
from job.storage import local, retry
from job.storage.uri import LOCK

LEASE_SECONDS = 60.0
"""How long a lease stays without being renewed."""
RENEWALS = 6
"""How often it is renewed in that time."""
UNSEEN = 0.5
"""For what part of that time after a renewal the holder writes without another look."""
LAST_SECONDS = 5.0
"""How long giving a lease up waits for a renewal that is under way."""
ROUNDS = 5
"""How often taking a lease begins anew, as it changed hands or is not listed, until it fails."""


class TakenOver(StorageError):
    """The output is another job's by now."""


class Slipped(TakenOver):
    """And something was written in the moment in which it became another's."""


class Lease:
    """The lease of the output whose folder for leases is `uri`; a `storage.Guard` of what is there.

    `seconds` is LEASE_SECONDS unless it is given.
    """

    def __init__(self, uri: str, seconds: float | None = None) -> None:
        self._uri = uri
        self._seconds = LEASE_SECONDS if seconds is None else seconds
        self._me = myself()
        self._number = 0
        self._lost = False
        self._confirmed = 0.0
        """When the last renewal that is known to be stored was begun."""
        self._released = threading.Event()
        self._looking = threading.Lock()
        """Where a store shows half of what is written, this job must not see half of its own."""
        self._renewing: threading.Thread | None = None
        self.conditions = storage.Conditions()

    def acquire(self) -> None:
        """Takes the lease and renews it from now on.

        Raises StorageError where another job holds it and is alive, or the store does not show
        what was just stored there.
        """
        if storage.is_local(self._uri):
            folder = storage.local_path(self._uri)
            retry.call("write", self._uri, lambda: folder.mkdir(parents=True, exist_ok=True))
        self.conditions = storage.conditions(self._uri)
        for _ in range(ROUNDS):
            number, holder = self._current()
            if holder is not None and not self._is_dead(number, holder):
                log.info("the output's lease changed hands; looking again", output=self._output)
                continue
            if self._take(number, holder):
                break
        else:
            raise StorageError(
                self._output,
                "its lease cannot be taken: what is stored there is not listed, or changes hands",
                fix="write the URI without empty, . or .. parts, or name an output that no other "
                "job starts on",
            )
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewing.start()

    @property
    def fence(self) -> str:
        """What tells this holding of the lease from every other."""
        return f"{self._number}-{self._me.id}"

    @property
    def held(self) -> bool:
        """Whether this job has the lease, as far as it has seen."""
        return self._number > 0 and not self._lost

    def check(self) -> None:
        """Looks whether the lease is still held. Raises TakenOver where not."""
        self._require_taken()
        with self._looking:
            holder = self._look()
        if self._lost:
            raise self._taken_over(holder)

    def ensure(self) -> None:
        """As `check`, but looks only if the lease may have expired since its last renewal."""
        self._require_taken()
        if self._lost or self._age() > UNSEEN * self._seconds:
            self.check()

    @contextmanager
    def writing(self, uri: str, *, conditional: bool = False) -> Iterator[None]:
        """Within, one file at the output may be written or removed.

        Raises TakenOver if the output is another job's: before, so that nothing is written; or
        Slipped afterwards, if it became so meanwhile and the store let it through.
        """
        with self._locked(exclusive=False) as locked:
            if locked:
                self.check()
            else:
                self.ensure()
            try:
                yield
            finally:
                if not (locked or conditional) and self._age() > self._seconds:
                    self._look_back(uri)

    def release(self) -> None:
        """Gives the lease up; nothing happens where it is not held."""
        self._released.set()
        if self._renewing is not None:  # it could bring back what is removed here
            self._renewing.join(LAST_SECONDS)
        if not self.held:
            return
        try:
            with self._looking:
                for number in sorted(self._numbers()):
                    if number <= self._number:
                        storage.delete(self._at(number), _Own(self))
        except TakenOver:
            return
        self._number = 0

    def _take(self, number: int, seen: Holder | None) -> bool:
        """Takes the lease after `number`, unless its holder `seen` has moved."""
        mine, started = self._at(number + 1), _now()
        try:
            with self._locked(exclusive=True):
                if self._current() != (number, seen):
                    return False
                if not storage.write_new(mine, self._me.to_text().encode()):
                    return False
                # A renewal may have been under way, where nothing is locked. And who released the
                # lease meanwhile removed the numbers below; then this one is alone.
                moved = seen is not None and self._read(number) not in (seen, None)
                if moved or max(self._numbers(), default=0) != number + 1:
                    storage.delete(mine)
                    return False
        except TimeoutError:
            raise _held(
                self._uri, seen, "was stopped in the middle of a write", "continue it, or end it"
            ) from None
        self._number, self._confirmed = number + 1, started
        return True

    def _is_dead(self, number: int, holder: Holder) -> bool:
        """Whether the holder has died; False where the lease changed hands while it was watched.

        Raises StorageError where it is alive.
        """
        match life(holder, self._me.machine):
            case "dead":
                log.info("the job that held the output has died", process=holder.process)
                return True
            case "running":
                raise _held(self._uri, holder, "is running")
            case "stopped":
                raise _held(self._uri, holder, "is stopped", "continue it, or end it")
            case "unknown":
                pass
        log.info(
            "the output is held; waiting to see whether its job is alive",
            host=holder.host,
            since=holder.since,
            at_most=log.duration(self._seconds),
        )
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            time.sleep(self._seconds / RENEWALS / 4)
            now_number, now_holder = self._current()
            if now_number != number:
                return False
            if now_holder != holder:
                raise _held(self._uri, holder, "is running")
        log.warn("the lease of the job that held the output has expired", host=holder.host)
        return True

    def _renew(self) -> None:
        mine = self._me
        with retry.abandoned_with(self._released):
            while not self._released.wait(self._seconds / RENEWALS):
                mine = replace(mine, renewed=mine.renewed + 1)
                started, own = _now(), _Own(self)
                try:
                    with self._looking:
                        storage.write_text(self._at(self._number), mine.to_text(), own)
                        self._confirm(started, exact=own.exact)
                except retry.Abandoned:
                    return
                except TakenOver as error:
                    log.warn("this job writes nothing more at its output", reason=error)
                    return
                except Exception as error:  # noqa: BLE001 - a lease that nobody renews is lost
                    log.warn("the output's lease could not be renewed", reason=error)

    def _confirm(self, started: float, *, exact: bool) -> None:
        """Notes a renewal. One that came too late may have crossed a takeover: looks again.

        Where the store may have let it through although another job had come and gone, the lease
        is given up: what is there is no proof.
        """
        if self._age() > self._seconds:
            holder = self._look()
            if not exact and not self._lost:
                self._lost = True
                storage.delete(self._at(self._number))
            if self._lost:
                raise self._taken_over(holder)
        self._confirmed = started

    def _look_back(self, uri: str) -> None:
        try:
            self.check()
        except TakenOver as error:
            raise Slipped.from_problems(error.problems) from error

    def _look(self) -> Holder | None:
        """Who holds the lease now; notes that it is lost where that is another, or nobody.

        Whoever took it over may be done since, and the numbers begin anew then: the holder counts.
        """
        number, holder = self._current()
        if number != self._number or holder is None or holder.id != self._me.id:
            self._lost = True
        return holder

    def _current(self) -> tuple[int, Holder | None]:
        """The highest number and its holder; zero and None where there is no lease."""
        number = max(self._numbers(), default=0)
        return number, self._read(number) if number else None

    def _read(self, number: int) -> Holder | None:
        """The holder of a number; None where it was released since it was listed."""
        try:
            return Holder.from_text(storage.read_bytes(self._at(number)).decode(errors="replace"))
        except MissingInputError:
            return None

    def _numbers(self) -> tuple[int, ...]:
        names = (entry.path.removesuffix(".json") for entry in storage.list_files(self._uri))
        return tuple(int(name) for name in names if name.isdecimal())

    def _locked(self, *, exclusive: bool) -> AbstractContextManager[bool]:
        """On a local disk, the lock that a write shares and a takeover has alone; else False."""
        if not storage.is_local(self._uri):
            return nullcontext(False)
        path = storage.local_path(self._uri) / LOCK
        return local.locked(path, exclusive=exclusive, seconds=self._seconds)

    def _age(self) -> float:
        return _now() - self._confirmed

    def _at(self, number: int) -> str:
        return storage.join(self._uri, f"{number}.json")

    @property
    def _output(self) -> str:
        return storage.parent(self._uri)

    def _require_taken(self) -> None:
        if not self._number:
            raise StorageError(
                self._output,
                "nothing is written without the output's lease, which this job does not hold",
                fix="take the output first",
            )

    def _taken_over(self, holder: Holder | None) -> TakenOver:
        found = _held(self._uri, holder, "has taken the output over")
        return TakenOver.from_problems(found.problems)


class _Own:
    """The guard of the lease's own file: looks before every write, and says if that was exact."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self.exact = False

    @property
    def conditions(self) -> storage.Conditions:
        return self._lease.conditions

    def ensure(self) -> None:
        pass

    @contextmanager
    def writing(self, uri: str, *, conditional: bool = False) -> Iterator[None]:
        with self._lease._locked(exclusive=False) as locked:
            self.exact = locked or conditional
            holder = self._lease._look()
            if self._lease._lost:
                raise self._lease._taken_over(holder)
            yield


def _held(
    uri: str,
    holder: Holder | None,
    what: str,
    fix: str = "wait for it, stop it, or name another output",
) -> StorageError:
    who = "it is done since"
    if holder is not None:
        who = f"host {holder.host}, process {holder.process}, since {holder.since}"
    return StorageError(storage.parent(uri), f"another job {what} ({who})", fix=fix)


def _now() -> float:
    """Seconds that go on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
