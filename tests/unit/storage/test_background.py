"""Background tasks: which wait, which are skipped, and which error is raised when."""

import threading
import time

import pytest

from job.storage.background import BackgroundTasks

WAIT = 10.0  # seconds; only a defect waits as long


def fail(with_what: str) -> None:
    raise ValueError(with_what)


def test_who_asks_for_more_than_may_be_under_way_waits() -> None:
    gate, done = threading.Event(), list[int]()

    def call(number: int) -> None:
        assert gate.wait(WAIT)
        done.append(number)

    with BackgroundTasks("test", max_pending=2) as background:
        for number in (1, 2):
            background.submit(lambda number=number: call(number))  # type: ignore[misc]
        third = threading.Thread(target=lambda: background.submit(lambda: call(3)))
        third.start()
        third.join(0.2)
        assert third.is_alive(), "a third has to wait for a place"
        assert done == []
        gate.set()
        third.join(WAIT)
    assert done == [1, 2, 3]


def test_the_first_failure_in_the_order_of_asking_is_raised_whichever_comes_first() -> None:
    second = threading.Event()

    def first() -> None:
        assert second.wait(WAIT)
        fail("first")

    def other() -> None:
        second.set()
        fail("second")

    background = BackgroundTasks("test", threads=2)
    background.submit(first)
    background.submit(other)
    with pytest.raises(ValueError, match="first"):
        background.finish()


def test_a_failure_is_raised_at_the_next_call_that_is_asked_for() -> None:
    background, asked = BackgroundTasks("test", max_pending=1), list[str]()
    background.submit(lambda: fail("gone"))
    with pytest.raises(ValueError, match="gone"):
        background.submit(lambda: asked.append("the next"))
    background.finish()
    assert asked == []


def test_an_error_on_its_way_out_waits_for_no_call_that_has_not_begun() -> None:
    begun, asked, done = threading.Event(), threading.Event(), list[str]()
    background = BackgroundTasks("test")

    def call() -> None:
        begun.set()
        assert asked.wait(WAIT)
        end = time.monotonic() + WAIT
        while time.monotonic() < end and not background._pending[-1].future.cancelled():
            time.sleep(0.01)  # until the error is on its way out

    def work() -> None:
        with background:
            background.submit(call)
            background.submit(lambda: done.append("second"))
            asked.set()
            assert begun.wait(WAIT)
            raise MemoryError

    with pytest.raises(MemoryError):
        work()
    assert done == []


def test_a_failure_skips_the_tasks_that_wait() -> None:
    gate, done = threading.Event(), list[str]()

    def first() -> None:
        assert gate.wait(WAIT)
        fail("first")

    background = BackgroundTasks("test")
    background.submit(first)
    background.submit(lambda: done.append("second"))
    gate.set()
    with pytest.raises(ValueError, match="first"):
        background.finish()
    background.finish()
    assert done == []


def test_waiting_tasks_can_be_canceled_and_running_ones_cannot() -> None:
    begun, gate, done = threading.Event(), threading.Event(), list[int]()

    def call(number: int) -> None:
        begun.set()
        assert gate.wait(WAIT)
        done.append(number)

    background = BackgroundTasks("test", max_pending=2)
    background.submit(lambda: call(1))
    assert begun.wait(WAIT)
    background.submit(lambda: call(2))
    assert background.cancel_waiting() == 1
    background.submit(lambda: call(3))
    gate.set()
    background.finish()
    assert done == [1, 3]


def test_tasks_wait_for_room_and_one_that_is_too_large_runs_alone() -> None:
    gate, done = threading.Event(), list[str]()

    def first() -> None:
        assert gate.wait(WAIT)
        done.append("first")

    with BackgroundTasks("test", max_size=10) as background:
        background.submit(first, 6)
        background.submit(lambda: done.append("second"), 4)
        assert background.size == 10
        third = threading.Thread(target=lambda: background.submit(lambda: done.append("large"), 25))
        third.start()
        third.join(0.2)
        assert third.is_alive(), "a third has to wait for room"
        gate.set()
        third.join(WAIT)
    assert done == ["first", "second", "large"]
    assert background.size == 0
