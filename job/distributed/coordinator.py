"""Coordinates the processes of one job, independently of their process group.

All connect to the store at rank 0's address. A thread in each process sends heartbeats and monitors
the others: if one fails, stops or dies, the whole job ends, with one exit code and one error
message, from rank 0.
"""

import json
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from job import log, signals
from job.distributed.world import World
from job.errors import INTERNAL, OK, STOPPED, JobError, Problem, ReportedError, reported

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")

JOIN_SECONDS = 1800.0
"""How long to wait for all processes to start; nodes may have to boot and pull images."""
HEARTBEAT_SECONDS = 1.0
LOST_SECONDS = 120.0
"""How long a process may be silent before it counts as dead."""
SILENT_SECONDS = 4 * HEARTBEAT_SECONDS
"""The same, once a connection has broken or the job is ending."""
POLL_SECONDS = 0.2
EXIT_SECONDS = 10.0
"""How long rank 0 waits at the end for the others to notice."""
STOP_EXIT_SECONDS = 2.0
"""The same after a signal, which leaves only a few seconds to report it."""

END, ERROR, LOST, STOP = "end", "error", "lost", "stop"
CONNECTION_ERRORS = (RuntimeError, OSError)
"""What the store raises if its connection is lost."""


class PeerLost(JobError):
    """Another process of the job has died."""

    exit_code = INTERNAL
    title = "a process of the job was lost"


class Coordinator:
    """The connection of one process of the job to the others."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._closed = threading.Event()
        self._heartbeats: dict[int, tuple[int, float]] = {}
        """By rank, the last heartbeat and when it arrived."""
        self._lost = threading.Event()
        """Set once this process has noticed by itself that a connection is broken."""

    def join(self, identity: str) -> None:
        """Waits for all processes, which must have the same `identity`: spec and version.

        Raises PeerLost if some do not start or have another identity.
        """
        import torch.distributed as dist

        world = self.world
        try:
            store = self._connect(host=world.is_rank_zero and not world.launcher_hosts_store)
            self._store: dist.Store = dist.PrefixStore(f"job/{world.attempt}", store)
            joined_before = self._store.add(f"joined/{world.rank}", 1) > 1
        except CONNECTION_ERRORS as error:
            raise PeerLost(
                "MASTER_ADDR",
                f"rank 0 is unreachable: {error}",
                value=f"{world.address}:{world.port}",
                fix="read rank 0's log, and check that the others can reach its port",
            ) from error
        if joined_before:
            raise PeerLost(
                f"rank {world.rank}",
                "has joined already: processes of an earlier start are still running",
                fix="start all processes again",
            )
        self.publish(f"identity/{world.rank}", identity)
        self._wait_for_all()
        self._require_same_identity()
        log.info("processes joined", processes=world.size)
        threading.Thread(target=self._monitor, name="coordinator", daemon=True).start()

    # --- messages ----------------------------------------------------------------------------

    def publish(self, key: str, value: object) -> None:
        """Stores a value, as JSON, for the other processes."""
        self._store.set(key, json.dumps(value))

    def wait_for(self, key: str, kind: type[T]) -> T:
        """Waits until another process publishes the key; returns its value."""
        while not self._has(key):
            time.sleep(POLL_SECONDS)
        return self._get(key, kind)

    def open_store(self, name: str) -> "dist.Store":
        """A store for a process group, with its own connection: a wait blocks all users of one."""
        import torch.distributed as dist

        return dist.PrefixStore(f"{name}/{self.world.attempt}", self._connect(host=False))

    def _has(self, key: str) -> bool:
        return self._store.check([key])

    def _get(self, key: str, kind: type[T]) -> T:
        value = json.loads(self._store.get(key))
        assert isinstance(value, kind), f"{key} is a {type(value).__name__}"
        return value

    def _connect(self, *, host: bool) -> "dist.TCPStore":
        import torch.distributed as dist

        return dist.TCPStore(
            self.world.address,
            self.world.port,
            is_master=host,
            timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,
        )

    # --- joining -----------------------------------------------------------------------------

    def _wait_for_all(self) -> None:
        keys = [f"identity/{rank}" for rank in range(self.world.size)]
        deadline = time.monotonic() + JOIN_SECONDS
        try:
            while not self._store.check(keys):
                if time.monotonic() > deadline:
                    missing = [rank for rank, key in enumerate(keys) if not self._has(key)]
                    raise PeerLost(
                        _names(missing),
                        f"did not start within {log.duration(JOIN_SECONDS)}",
                        fix="read the log of that process",
                    )
                time.sleep(POLL_SECONDS)
        except CONNECTION_ERRORS as error:
            raise _peer_lost([0], str(error)) from error

    def _require_same_identity(self) -> None:
        identities = [self._get(f"identity/{rank}", str) for rank in range(self.world.size)]
        self._store.add("compared", 1)
        self._wait_for_count("compared")  # rank 0 may host the store, and must not exit first
        if other := [rank for rank, each in enumerate(identities) if each != identities[0]]:
            raise PeerLost(
                _names(other),
                "has a different spec or version of the job than rank 0",
                fix="start the same command in the same environment on every node",
            )

    def _wait_for_count(self, counter: str, absent: int = 0, seconds: float = EXIT_SECONDS) -> None:
        """Waits up to `seconds` until all but `absent` processes have incremented `counter`."""
        deadline = time.monotonic() + seconds
        expected = self.world.size - absent
        while self._store.add(counter, 0) < expected and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)

    # --- ending ------------------------------------------------------------------------------

    def finish(self, code: int) -> None:
        """On rank 0: makes the other ranks exit with `code`, and waits briefly for them."""
        if self._closed.is_set():
            return
        # Dead ranks never leave. Once another rank has left, a launcher soon asks rank 0 to stop,
        # whose error must have been reported by then.
        dead = self._silent_ranks(SILENT_SECONDS) if code != OK else []
        # The signal may be that of a launcher, because a rank has died just now.
        seconds = STOP_EXIT_SECONDS if code == STOPPED else EXIT_SECONDS
        with suppress(*CONNECTION_ERRORS):
            self.publish(END, code)
            self._wait_for_count("left", absent=1 + len(dead), seconds=seconds)
        self._closed.set()

    def wait_for_end(self) -> NoReturn:
        """On other ranks: waits until the monitor thread exits the process, when rank 0 ends."""
        while True:
            time.sleep(LOST_SECONDS)

    def fail(self, error: BaseException) -> NoReturn:
        """On other ranks: reports the error to rank 0, and exits when rank 0 does."""
        failure = reported(error)
        with suppress(*CONNECTION_ERRORS):
            if isinstance(failure, PeerLost):  # rank 0 knows which ranks are silent
                self.publish(LOST, str(error.__cause__ or failure))
            elif failure.exit_code != STOPPED:
                self.publish(ERROR, _to_json(failure, self.world.rank))
        # The monitor exits as soon as rank 0 has ended, or is dead.
        if failure.exit_code == STOPPED:
            self.wait_for_end()  # rank 0 may still be storing the checkpoint
        if isinstance(failure, PeerLost) and self._silent_ranks(SILENT_SECONDS):
            # Rank 0 is dead. A launcher that hosts the store keeps that from the monitor, and kills
            # this process before it has been silent for LOST_SECONDS.
            signals.abandon(failure)
        time.sleep(2 * LOST_SECONDS)
        signals.abandon(failure)

    def connection_lost(self, error: BaseException) -> PeerLost:
        """The error for a broken connection; names the ranks that are silent.

        The work has failed by then: torchrun, which stops the others once a rank has died, must not
        have it reported as stopped.
        """
        self._lost.set()
        with signals.deferred():
            # A dead rank's last heartbeat is read up to one heartbeat later, and on a busy node
            # two.
            time.sleep(SILENT_SECONDS + 2 * HEARTBEAT_SECONDS)
            signals.mark_work_ended()
        return _peer_lost(self._silent_ranks(SILENT_SECONDS), str(error))

    # --- the monitor thread ------------------------------------------------------------------

    def _monitor(self) -> None:
        beat, next_beat, stop_published = 0, 0.0, False
        while not self._closed.wait(POLL_SECONDS):
            try:
                if time.monotonic() >= next_beat:
                    beat, next_beat = beat + 1, time.monotonic() + HEARTBEAT_SECONDS
                    self.publish(f"beat/{self.world.rank}", beat)
                    self._read_heartbeats()
                if signals.received() is None:
                    if self._has(STOP):
                        signals.relay()
                elif not stop_published:
                    stop_published = True
                    self.publish(STOP, signals.received())
                if self.world.is_rank_zero:
                    self._check_workers()
                else:
                    self._check_rank_zero()
            except CONNECTION_ERRORS as error:
                if self._closed.is_set():
                    return
                if signals.received() is not None:
                    signals.exit_now(STOPPED)
                signals.abandon(self._store_lost(error))

    def _store_lost(self, error: BaseException) -> PeerLost:
        """The error for a lost store, which the launcher hosts, or else rank 0."""
        if not self.world.launcher_hosts_store:
            return _peer_lost([0], str(error))
        return PeerLost(
            "the launcher",
            f"has died or is unreachable ({error})",
            value=f"{self.world.address}:{self.world.port}",
            fix="run the job again, by its launcher; it resumes from the last checkpoint",
        )

    def _read_heartbeats(self) -> None:
        now = time.monotonic()
        ranks = range(1, self.world.size) if self.world.is_rank_zero else (0,)
        for rank in ranks:
            key = f"beat/{rank}"
            beat = self._get(key, int) if self._has(key) else 0
            if self._heartbeats.get(rank, (-1, 0.0))[0] != beat:
                self._heartbeats[rank] = (beat, now)

    def _silent_ranks(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, heard) in self._heartbeats.items() if now - heard >= seconds]

    def _check_workers(self) -> None:
        if self._has(ERROR):
            signals.abandon(_from_json(self._get(ERROR, dict)))
        if self._has(LOST) and not self._lost.is_set():
            # Rank 0 has not noticed: it waits for a live rank, which waits for the dead one.
            signals.abandon(_peer_lost(self._silent_ranks(SILENT_SECONDS), self._get(LOST, str)))
        if silent := self._silent_ranks(LOST_SECONDS):
            signals.abandon(_peer_lost(silent, f"silent for {log.duration(LOST_SECONDS)}"))

    def _check_rank_zero(self) -> None:
        if self._has(END):
            code = self._get(END, int)
            self._store.add("left", 1)
            if code != OK:  # torchrun blames the first process to exit, and stops the others
                time.sleep(HEARTBEAT_SECONDS)
            signals.exit_now(code)
        if self._silent_ranks(LOST_SECONDS):
            signals.abandon(_peer_lost([0], f"silent for {log.duration(LOST_SECONDS)}"))


@contextmanager
def ending_workers(coordinator: Coordinator | None) -> Iterator[None]:
    """Context in which rank 0 runs the job; on exit, the other ranks exit with the same code."""
    if coordinator is None:
        yield
        return
    code = OK
    # Callbacks registered later, by the run itself, are called first.
    with signals.on_abandon(lambda error: coordinator.finish(error.exit_code)):
        try:
            yield
        except BaseException as error:
            code = reported(signals.cause_of(error)).exit_code
            raise
        finally:
            coordinator.finish(code)


def _peer_lost(ranks: list[int], reason: str) -> PeerLost:
    return PeerLost(
        _names(ranks),
        f"has died or is unreachable ({reason})",
        fix="read its own log, then run the job again; it resumes from the last checkpoint",
    )


def _names(ranks: list[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks) or "a process"


def _to_json(error: ReportedError, rank: int) -> dict[str, Any]:
    return {
        "code": error.exit_code,
        "title": error.title,
        "rank": rank,
        "problems": [asdict(problem) for problem in error.problems],
    }


def _from_json(message: dict[str, Any]) -> ReportedError:
    """Another rank's error, with its exit code and title."""
    problems = [Problem(**problem) for problem in message["problems"]]
    error = JobError.from_problems(problems)
    error.exit_code = message["code"]
    error.title = f"{message['title']}, in rank {message['rank']}"
    return error


def silence_logs() -> None:
    """On ranks other than 0: logs errors only."""
    log.configure("json" if log.is_json() else "text", "ERROR")
    warnings.simplefilter("ignore")
