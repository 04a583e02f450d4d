"""Work on daemon threads gives its results in order, and its errors to who waits."""

import threading
import weakref

import pytest

from job.local import daemon_threads


def test_results_come_in_order_and_as_many_items_run_at_once_as_there_are_threads() -> None:
    all_run = threading.Barrier(3, timeout=60)

    def work(item: int) -> int:
        all_run.wait()
        return 10 * item

    found = daemon_threads.for_each(work, range(6), threads=3, name="test")
    assert found == [0, 10, 20, 30, 40, 50]
    assert daemon_threads.for_each(work, [], threads=3, name="test") == []


def test_a_thread_that_still_works_is_known_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started = weakref.WeakSet[threading.Thread]()
    monkeypatch.setattr(daemon_threads, "_started", started)
    go_on = threading.Event()
    found = daemon_threads.start(lambda: go_on.wait(60), name="test")
    assert daemon_threads.any_runs()
    go_on.set()
    assert found.result(60)
    for thread in list(started):
        thread.join(60)
    assert not daemon_threads.any_runs()


def test_an_error_is_raised_to_who_waits_and_the_other_items_are_done() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise OSError("no such file")
        done.append(item)

    with pytest.raises(OSError, match="no such file"):
        daemon_threads.for_each(work, [0, 1], threads=1, name="test")
    assert done == [0]
    started = daemon_threads.start(lambda: work(1), name="test")
    with pytest.raises(OSError, match="no such file"):
        started.result(60)
