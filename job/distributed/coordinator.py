"""The processes that train together, where there are several: what they tell each other.

All speak through the store at rank 0's address, beside their training. A thread in each says that
it is alive and looks after the others: whoever fails, stops or dies ends the job everywhere, with
one exit code and one account of why, which rank 0 gives.
"""

import json
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn

from job import log, signals
from job.distributed.world import World
from job.errors import INTERNAL, OK, STOPPED, JobError, Problem, ReportedError, reported

JOIN_SECONDS = 1800.0
"""How long a process waits for the others to start: images are pulled, nodes come up."""
LOST_SECONDS = 120.0
"""How long a process may be silent before it is taken for dead."""
BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.2
LEAVE_SECONDS = 10.0
"""How long rank 0 waits at its end for the others to hear of it."""

END, ERROR, STOP = "end", "error", "stop"
GONE = (RuntimeError, OSError)
"""What the store raises where it is gone."""


class PeerLost(JobError):
    """Another process of the job has died."""

    exit_code = INTERNAL
    title = "a process of the job was lost"


class Coordinator:
    """The processes of the job, as one of them sees the others."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._closed = threading.Event()
        self._beats: dict[int, tuple[int, float]] = {}

    def join(self, identity: str) -> None:
        """Waits for all processes, which must have the same `identity`: spec and version.

        Raises PeerLost where they do not come, or do not fit together.
        """
        import torch.distributed as dist

        world = self.world
        try:
            store = self._connect(host=world.first and not world.served)
            self._store = dist.PrefixStore(f"job/{world.attempt}", store)
            again = self._store.add(f"joined/{world.rank}", 1) > 1
        except GONE as error:
            raise PeerLost(
                "MASTER_ADDR",
                f"rank 0 cannot be reached: {error}",
                value=f"{world.address}:{world.port}",
                fix="look at rank 0's log, and whether its port is open to the others",
            ) from error
        if again:
            raise PeerLost(
                f"rank {world.rank}",
                "has joined before; what is left of that start must end first",
                fix="start all processes again",
            )
        self._set(f"identity/{world.rank}", identity)
        self._wait_for_all()
        self._require_one_job()
        log.info("processes joined", processes=world.size)
        threading.Thread(target=self._watch, name="coordinator", daemon=True).start()

    def tell(self, key: str, value: Any) -> None:
        """Leaves a value, as JSON has it, for the others to hear."""
        self._set(key, value)

    def hear(self, key: str) -> Any:
        """The value that another process tells, as soon as it does."""
        while not self._store.check([key]):
            time.sleep(LOOK_SECONDS)
        return self._get(key)

    def wait_for_end(self) -> NoReturn:
        """In another rank than 0: waits until the thread leaves, as rank 0 does."""
        while True:
            time.sleep(LOST_SECONDS)

    def store(self, name: str) -> Any:
        """A part of the store for a process group, which waits in it: by a connection of its own,
        since one that waits keeps every other thread out.
        """
        import torch.distributed as dist

        return dist.PrefixStore(f"{name}/{self.world.attempt}", self._connect(host=False))

    def _connect(self, *, host: bool) -> Any:
        import torch.distributed as dist

        return dist.TCPStore(
            self.world.address,
            self.world.port,
            is_master=host,
            timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,
        )

    def lost(self, error: BaseException) -> PeerLost:
        """The error for a connection that broke, naming who is silent since."""
        time.sleep(5 * BEAT_SECONDS)
        return _lost(self._silent(4 * BEAT_SECONDS), str(error))

    def fail(self, error: BaseException) -> NoReturn:
        """In another rank than 0: hands the error to rank 0 and leaves as that does."""
        found = reported(error)
        with suppress(*GONE):
            if not isinstance(found, PeerLost) and found.exit_code != STOPPED:
                self._set(ERROR, _packed(found, self.world.rank))
        # The thread leaves as soon as rank 0 has ended, or is dead.
        if found.exit_code == STOPPED:
            self.wait_for_end()  # rank 0 may still be storing the checkpoint
        time.sleep(2 * LOST_SECONDS)
        signals.give_up(found)

    def end(self, code: int) -> None:
        """In rank 0: the others leave with `code`; waits a moment until they know."""
        if self._closed.is_set():
            return
        with suppress(*GONE):
            self._set(END, code)
            self._wait_until("left", others=1)
        self._closed.set()

    def _wait_for_all(self) -> None:
        names = [f"identity/{rank}" for rank in range(self.world.size)]
        deadline = time.monotonic() + JOIN_SECONDS
        try:
            while not self._store.check(names):
                if time.monotonic() > deadline:
                    missing = [name for name in names if not self._store.check([name])]
                    raise PeerLost(
                        ", ".join(name.replace("identity/", "rank ") for name in missing),
                        f"did not start within {log.duration(JOIN_SECONDS)}",
                        fix="look at the log of that process",
                    )
                time.sleep(LOOK_SECONDS)
        except GONE as error:
            if isinstance(error, PeerLost):
                raise
            raise _lost([0], str(error)) from error

    def _require_one_job(self) -> None:
        every = [self._get(f"identity/{rank}") for rank in range(self.world.size)]
        self._store.add("compared", 1)
        self._wait_until("compared")  # rank 0 may take the store with it
        if other := [rank for rank, each in enumerate(every) if each != every[0]]:
            raise PeerLost(
                _names(other),
                "has another spec or version of the job than rank 0",
                fix="start the same command with the same environment on every node",
            )

    def _wait_until(self, counter: str, others: int = 0) -> None:
        """Waits a moment until all processes but `others` have counted themselves."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while (
            self._store.add(counter, 0) < self.world.size - others and time.monotonic() < deadline
        ):
            time.sleep(LOOK_SECONDS / 4)

    # --- the thread that looks after the others --------------------------------------------

    def _watch(self) -> None:
        beat, next_beat, told_stop = 0, 0.0, False
        while not self._closed.wait(LOOK_SECONDS):
            try:
                if time.monotonic() >= next_beat:
                    beat, next_beat = beat + 1, time.monotonic() + BEAT_SECONDS
                    self._set(f"beat/{self.world.rank}", beat)
                    self._listen()
                if signals.received() is None:
                    if self._store.check([STOP]):
                        signals.relay()
                elif not told_stop:
                    told_stop = True
                    self._set(STOP, signals.received())
                if self.world.first:
                    self._look_after_others()
                else:
                    self._look_after_first()
            except GONE as error:
                if self._closed.is_set():
                    return
                if signals.received() is not None:
                    signals.leave(STOPPED)
                signals.give_up(_lost([0], str(error)))

    def _listen(self) -> None:
        """Notes which ranks have said something new."""
        now = time.monotonic()
        watched = range(1, self.world.size) if self.world.first else (0,)
        for rank in watched:
            key = f"beat/{rank}"
            beat = self._get(key) if self._store.check([key]) else 0
            if self._beats.get(rank, (-1, 0.0))[0] != beat:
                self._beats[rank] = (beat, now)

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, heard) in self._beats.items() if now - heard >= seconds]

    def _look_after_others(self) -> None:
        if self._store.check([ERROR]):
            signals.give_up(_unpacked(self._get(ERROR)))
        if silent := self._silent(LOST_SECONDS):
            signals.give_up(_lost(silent, f"silent for {log.duration(LOST_SECONDS)}"))

    def _look_after_first(self) -> None:
        if self._store.check([END]):
            code = int(self._get(END))
            self._store.add("left", 1)
            if code != OK:  # torchrun takes the first to leave for the cause, and stops the others
                time.sleep(BEAT_SECONDS)
            signals.leave(code)
        if self._silent(LOST_SECONDS):
            signals.give_up(_lost([0], f"silent for {log.duration(LOST_SECONDS)}"))

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key))


@contextmanager
def joined(coordinator: Coordinator | None) -> Iterator[None]:
    """Within, rank 0 runs the job; the others leave with its exit code when it ends."""
    if coordinator is None:
        yield
        return
    code = OK
    # First of the last words that are said after the run's own.
    with signals.on_give_up(lambda error: coordinator.end(error.exit_code)):
        try:
            yield
        except BaseException as error:
            code = reported(error).exit_code
            raise
        finally:
            coordinator.end(code)


def _lost(ranks: list[int], why: str) -> PeerLost:
    return PeerLost(
        _names(ranks),
        f"has died or cannot be reached ({why})",
        fix="look at its own log, then run the job again; it goes on from the last checkpoint",
    )


def _names(ranks: list[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks) or "a process"


def _packed(error: ReportedError, rank: int) -> dict[str, Any]:
    return {
        "code": error.exit_code,
        "title": error.title,
        "rank": rank,
        "problems": [asdict(problem) for problem in error.problems],
    }


def _unpacked(packed: dict[str, Any]) -> ReportedError:
    """Another rank's error, with its exit code and title."""
    problems = [Problem(**problem) for problem in packed["problems"]]
    error = JobError.from_problems(problems)
    error.exit_code, error.title = packed["code"], f"{packed['title']}, in rank {packed['rank']}"
    return error


def silence() -> None:
    """In another rank than 0: nothing is said but errors."""
    log.configure("json" if log.is_json() else "text", "ERROR")
    warnings.simplefilter("ignore")
