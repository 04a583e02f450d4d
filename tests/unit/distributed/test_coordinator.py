"""What the processes of a job tell each other when one of them is lost."""

import time
from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from job import signals
from job.distributed import coordinator
from job.distributed.coordinator import Coordinator, PeerLost
from job.distributed.world import World
from job.errors import STOPPED, ReportedError


class Abandoned(BaseException):
    def __init__(self, error: ReportedError) -> None:
        self.error = error


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Coordinator]:
    """Makes one of four processes, which share a store; the last has been silent for a while."""

    def abandon(error: ReportedError) -> None:
        raise Abandoned(error)

    monkeypatch.setattr(signals, "_state", signals._State())
    monkeypatch.setattr(signals, "abandon", abandon)
    monkeypatch.setattr(coordinator, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(coordinator, "HEARTBEAT_SECONDS", 0.01)
    store = HashStore()

    def make(rank: int) -> Coordinator:
        made = Coordinator(World(rank=rank, size=4))
        made._store = store
        now = time.monotonic() + 60
        others = (1, 2) if rank == 0 else (0,)
        made._heartbeats = dict.fromkeys(others, (9, now))
        if rank == 0:
            made._heartbeats[3] = (2, time.monotonic() - 1)
        return made

    return make


def test_a_signal_while_the_lost_rank_is_looked_up_does_not_replace_its_name(
    joined: Callable[[int], Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun stops the others as soon as one has died; the run has failed all the same."""
    deferred = []
    sleep = time.sleep

    def asleep(seconds: float) -> None:
        deferred.append(signals._state.deferred)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", asleep)
    error = joined(0).connection_lost(RuntimeError("Connection reset by peer"))
    assert error.problems[0].field == "rank 3"
    assert deferred == [True]
    assert signals._state.ended  # so that what follows is its report
    assert not signals._state.deferred


def test_rank_0_names_the_dead_rank_that_only_another_has_noticed(
    joined: Callable[[int], Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a rank that is alive, and that one for the dead one."""
    first, second = joined(0), joined(1)
    first._check_workers()
    lost = second.connection_lost(RuntimeError("Connection reset by peer"))
    with monkeypatch.context() as soon:
        soon.setattr(coordinator, "LOST_SECONDS", 0.0)  # rank 0 has this long to end the job
        with pytest.raises(Abandoned):
            second.fail(lost)
    with pytest.raises(Abandoned) as caught:
        first._check_workers()
    problem = caught.value.error.problems[0]
    assert isinstance(caught.value.error, PeerLost)
    assert problem.field == "rank 3"
    assert "Connection reset by peer" in problem.message
    first._lost.set()  # it has noticed by itself, and is about to report it
    first._check_workers()


def test_a_rank_whose_rank_0_is_dead_ends_with_its_name(
    joined: Callable[[int], Coordinator],
) -> None:
    """Not two minutes later: torchrun, whose store lives on, would have killed it by then."""
    second = joined(1)
    second._heartbeats[0] = (3, time.monotonic() - 1)
    started = time.monotonic()
    with pytest.raises(Abandoned) as caught:
        second.fail(second.connection_lost(RuntimeError("Connection reset by peer")))
    assert time.monotonic() - started < 5
    assert caught.value.error.problems[0].field == "rank 0"


def test_a_stopped_job_does_not_wait_long_for_a_rank_that_never_leaves(
    joined: Callable[[int], Coordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few seconds after the signal the process exits, whether it has reported it or not."""
    monkeypatch.setattr(coordinator, "STOP_EXIT_SECONDS", 0.3)
    started = time.monotonic()
    joined(0).finish(STOPPED)
    assert time.monotonic() - started < coordinator.EXIT_SECONDS / 2


@pytest.mark.parametrize(("launched", "named"), [(True, "the launcher"), (False, "rank 0")])
def test_the_process_whose_store_is_lost_is_named(launched: bool, named: str) -> None:
    """torchrun hosts it itself: rank 0 must not call itself dead."""
    world = World(rank=0, size=2, launcher_hosts_store=launched)
    lost = Coordinator(world)._store_lost(RuntimeError("Connection reset by peer"))
    assert lost.problems[0].field == named
    assert "Connection reset by peer" in lost.problems[0].message
