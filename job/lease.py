"""One job at a time on an output: a lease that its holder renews and that a dead one loses.

The lease is the highest numbered file in a folder. It is taken by creating the next number, which
only one of several can do where the store has conditional puts (S3, local disks). Whoever finds a
holder watches it: one that renews its lease is alive, and one that does not for LEASE_SECONDS is
dead. No clock is compared with another machine's. A holder that ran on this machine is looked up
among its processes, so that a restart after a crash need not wait.
"""

import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from job import log, storage
from job.errors import MissingInputError, StorageError
from job.storage import retry

LEASE_SECONDS = 60.0
"""How long a lease stays without being renewed."""
RENEWALS = 6
"""How often it is renewed in that time."""
LAST_SECONDS = 5.0
"""How long giving a lease up waits for a renewal that is under way."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease, as its file says."""

    id: str
    machine: str
    """This boot of this machine, and the namespace that `process` is a number of."""
    process: int
    process_started: str
    host: str
    since: str
    renewed: int = 0
    """How often; only that it changes counts."""

    def to_text(self) -> str:
        return json.dumps(asdict(self)) + "\n"


class Lease:
    """The lease of the output whose folder for leases is `uri`."""

    def __init__(self, uri: str, seconds: float = LEASE_SECONDS) -> None:
        self._uri, self._seconds = uri, seconds
        self._me = _myself()
        self._number = 0
        self._lost = False
        self._released = threading.Event()
        self._looking = threading.Lock()
        """Where a store shows half of what is written, this job must not see half of its own."""
        self._renewing: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lease and renews it from now on.

        Raises StorageError where another job holds it and is alive.
        """
        while not self._number:
            number, holder = self._current()
            if holder is not None and not self._is_dead(number, holder):
                continue  # it changed hands meanwhile
            self._take(number + 1)
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewing.start()

    @property
    def held(self) -> bool:
        """Whether this job has the lease, as far as it has seen."""
        return self._number > 0 and not self._lost

    def check(self) -> None:
        """Looks whether a lease that was taken is still held. Raises StorageError where not."""
        if not self._number:
            return
        with self._looking:
            holder = self._look()
        if self._lost:
            raise _held(self._uri, holder, "has taken the output over")

    def release(self) -> None:
        """Gives the lease up; nothing happens where it is not held."""
        self._released.set()
        if self._renewing is not None:  # it could bring back what is removed here
            self._renewing.join(LAST_SECONDS)
        if self.held:
            with self._looking:
                self._look()
        if not self.held:
            return
        for number in self._numbers():
            if number <= self._number:
                storage.delete(self._at(number))
        self._number = 0

    def _take(self, number: int) -> None:
        text = self._me.to_text()
        if storage.write_new(self._at(number), text.encode()):
            # Who released the lease meanwhile removed the numbers below; then this one is alone.
            if max(self._numbers(), default=0) == number:
                self._number = number
            else:
                storage.delete(self._at(number))

    def _is_dead(self, number: int, holder: Holder) -> bool:
        """Whether the holder has died; False where the lease changed hands while it was watched.

        Raises StorageError where it is alive.
        """
        if holder.machine == self._me.machine:
            started = _process_started(holder.process)
            if started != holder.process_started:
                log.info("the job that held the output has died", process=holder.process)
                return True
            raise _held(self._uri, holder, "is running")
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
                try:
                    with self._looking:
                        self._look()
                        if self._lost:
                            return
                        storage.write_text(self._at(self._number), mine.to_text())
                except retry.Abandoned:
                    return
                except Exception as error:  # noqa: BLE001 - a lease that nobody renews is lost
                    log.warn("the output's lease could not be renewed", reason=error)

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
        if not number:
            return 0, None
        try:
            return number, Holder(**json.loads(storage.read_bytes(self._at(number))))
        except MissingInputError:
            return number, None  # released between the two looks
        except (ValueError, TypeError) as error:
            log.warn("the output's lease is unreadable, so nobody's", reason=error)
            return number, None

    def _numbers(self) -> tuple[int, ...]:
        names = (entry.path.removesuffix(".json") for entry in storage.list_files(self._uri))
        return tuple(int(name) for name in names if name.isdecimal())

    def _at(self, number: int) -> str:
        return storage.join(self._uri, f"{number}.json")


def _held(uri: str, holder: Holder | None, what: str) -> StorageError:
    who = "it is done since"
    if holder is not None:
        who = f"host {holder.host}, process {holder.process}, since {holder.since}"
    return StorageError(
        storage.parent(uri),
        f"another job {what} ({who})",
        fix="wait for it, stop it, or name another output",
    )


def _myself() -> Holder:
    process = os.getpid()
    return Holder(
        id=secrets.token_hex(8),
        machine=f"{_text('/proc/sys/kernel/random/boot_id')} {_namespace()}",
        process=process,
        process_started=_process_started(process),
        host=socket.gethostname(),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _process_started(process: int) -> str:
    """When the process started, in ticks since boot; empty where there is none, or a dead one."""
    state, *rest = _text(f"/proc/{process}/stat").rpartition(")")[2].split() or ["Z"]
    return rest[18] if state not in "ZX" else ""


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return secrets.token_hex(8)  # unknown, so no other's


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
