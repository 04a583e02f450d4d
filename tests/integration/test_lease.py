"""Two jobs on one output: one writes, and a dead one's lease is taken over."""

import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job import signals, storage
from job.artifacts import lease_holder
from job.artifacts.lease import Lease
from job.artifacts.lease_holder import this_process
from job.artifacts.lease_wait import LeaseWait
from job.artifacts.output import Output
from job.artifacts.records import RunRecord
from job.errors import StorageError, UsageError
from tests.conftest import S3
from tests.jobs import Running, job, small_run, start
from tests.s3 import free_ports
from tests.suspended import suspend

SECONDS = 1.2
"""Of a lease that nobody renews, and which is waited for until it expires."""
LIVING_SECONDS = 6.0
"""Of a lease whose holder has to be seen alive: its renewals, one a second, may come late."""


@pytest.fixture(params=["local", "s3", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        return s3.uri("run/.lease")
    head = "memory://" if request.param == "memory" else ""
    return f"{head}{tmp_path}/run/.lease"


def elsewhere(lease: Lease) -> Lease:
    """As if its job ran on another machine."""
    lease._me = replace(lease._me, machine="another", host="another")
    return lease


def test_of_many_at_once_one_creates_a_file(uri: str) -> None:
    if uri.startswith("memory"):
        pytest.skip("it offers no conditional put")
    won = list[int]()

    def create(number: int) -> None:
        if storage.write_new(storage.join(uri, "1.json"), str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_text(storage.join(uri, "1.json")) == str(won[0])


def test_a_lease_that_is_given_up_leaves_nothing_and_is_free(uri: str) -> None:
    for _ in range(2):
        lease = Lease(uri, SECONDS)
        lease.acquire()
        assert lease.held
        lease.release()
        assert storage.list_files(uri) == ()


def test_a_living_holder_is_named_to_the_second(uri: str) -> None:
    first, second = elsewhere(Lease(uri, LIVING_SECONDS)), Lease(uri, LIVING_SECONDS)
    first.acquire()
    for _ in range(2):  # it goes on being renewed
        with pytest.raises(StorageError, match=r"another job is running \(host another"):
            second.acquire()
    first.check()
    first.release()
    second.acquire()
    second.release()


def test_the_lease_of_a_dead_holder_expires_and_the_dead_learns_of_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = asleep(uri, monkeypatch), Lease(uri, SECONDS)
    started = time.monotonic()
    second.acquire()
    assert SECONDS <= time.monotonic() - started < 10 * SECONDS  # on a busy machine
    first._renew()  # it wakes up
    assert not first.held
    with pytest.raises(StorageError, match="another job has taken over the output"):
        first.check()
    first.release()
    assert second.held
    assert len(storage.list_files(uri)) == 2
    second.release()
    assert storage.list_files(uri) == ()


def test_a_holder_that_was_asked_to_stop_is_waited_for(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `kubectl delete job`: the old pod still stores its checkpoint."""
    first, second = elsewhere(Lease(uri, LIVING_SECONDS)), Lease(uri, LIVING_SECONDS)
    first.acquire()
    monkeypatch.setattr(signals, "received", lambda: "SIGTERM")
    while not (first._folder.current()[1] or first._me).stopping:
        time.sleep(0.05)  # its lease says so without waiting for the next renewal
    waited, freed = list[bool](), threading.Timer(SECONDS, first.release)

    def begins_to_wait() -> None:
        waited.append(first.held)
        freed.start()

    second.acquire(LeaseWait(on_wait=begins_to_wait))
    freed.join()
    assert waited == [True]
    assert second.held
    second.release()


def test_a_pod_waits_for_a_running_holder_and_not_for_ever(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signals.GRACE_VARIABLE, "45")
    first, second = elsewhere(Lease(uri, LIVING_SECONDS)), Lease(uri, LIVING_SECONDS)
    first.acquire()
    holder = first._folder.current()[1]
    assert holder is not None
    assert LeaseWait().limit(holder, 60) == 45 + 60
    assert LeaseWait(seconds=0).limit(holder, 60) == 0
    with pytest.raises(StorageError, match=r"another job still holds it after .* \(host another"):
        second.acquire(LeaseWait(seconds=SECONDS))
    first.check()
    first.release()
    monkeypatch.delenv(signals.GRACE_VARIABLE)
    assert LeaseWait().limit(holder, 60) == 0
    assert LeaseWait().limit(replace(holder, stopping=True), 60) == 45 + 60


def test_a_holder_that_dies_while_it_is_waited_for_is_taken_over(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = lease_holder._state_and_start(process.pid)[1]
    holder = replace(this_process(), process=process.pid, process_started=started)
    storage.write_text(f"{tmp_path}/1.json", holder.to_text())
    lease = Lease(str(tmp_path), 30)
    lease.acquire(LeaseWait(seconds=60, on_wait=process.kill))
    process.wait()
    lease.release()


def test_of_two_pods_that_wait_for_one_that_dies_elsewhere_one_takes_over(uri: str) -> None:
    if uri.startswith("memory"):
        pytest.skip("it offers no conditional put")
    holder = elsewhere(Lease(uri, SECONDS))
    holder.acquire()
    took, refused = list[Lease](), list[str]()

    def wait() -> None:
        lease = Lease(uri, SECONDS)
        try:
            # It dies once it has been seen running, and leaves its lease behind.
            lease.acquire(LeaseWait(seconds=8 * SECONDS, on_wait=holder._released.set))
            took.append(lease)
        except StorageError as error:
            refused.append(str(error))

    pods = [threading.Thread(target=wait) for _ in range(2)]
    for pod in pods:
        pod.start()
    for pod in pods:
        pod.join()
    assert (len(took), len(refused)) == (1, 1)
    assert "another job" in refused[0]
    took[0].check()
    with pytest.raises(StorageError, match="has taken over the output"):
        holder.check()
    took[0].release()


@pytest.mark.parametrize("grace", [math.inf, math.nan, -1.0])
def test_a_holder_with_a_senseless_grace_period_is_not_waited_for_for_ever(
    grace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = replace(this_process(), grace=grace, stopping=True).to_text()
    holder = lease_holder.LeaseHolder.from_text(written)
    assert LeaseWait().limit(holder, 60) == 30 + 60
    # An earlier version, or another, may write whole numbers.
    text = json.dumps({"id": "a", "grace": 600, "stopping": True})
    assert LeaseWait().limit(lease_holder.LeaseHolder.from_text(text), 60) == 600 + 60
    monkeypatch.setenv(signals.GRACE_VARIABLE, str(grace))
    with pytest.raises(UsageError, match="must be a number of seconds"):
        this_process()


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[Running, Lease, int]]:
    """A job in a pod that waits for the output, the lease that it waits for, its metrics' port."""
    output, [port] = str(tmp_path / "out"), free_ports(1)
    lease = Lease(f"{output}/.lease")
    lease.acquire()
    given = small_run(output, "--set", f"runtime.metrics_port={port}", cache=tmp_path / "cache")
    process = start("prep", *given[1:], environ={signals.GRACE_VARIABLE: "30"})
    assert process.stderr is not None
    for line in process.stderr:
        if "waiting for it to end" in line:
            break
    yield process, lease, port
    lease.release()
    process.kill()
    process.communicate()


def test_a_job_that_waits_says_so_and_starts_once_the_output_is_free(
    waiting: tuple[Running, Lease, int],
) -> None:
    process, lease, port = waiting
    metrics = ""
    while 'stage="waiting"' not in metrics:
        assert process.poll() is None
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            metrics = page.read().decode()
        time.sleep(0.1)  # from the line that it waits to the server that says so
    lease.release()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said


def test_sigterm_ends_a_job_that_waits_for_the_output(
    waiting: tuple[Running, Lease, int],
) -> None:
    process, lease, _ = waiting
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    lease.check()


def asleep(uri: str, monkeypatch: pytest.MonkeyPatch) -> Lease:
    """A lease that was taken on another machine, whose job was then put to sleep."""
    lease = elsewhere(Lease(uri, SECONDS))
    with monkeypatch.context() as patched:
        patched.setattr(Lease, "_renew", lambda self: None)
        lease.acquire()
    return lease


def test_a_lease_that_another_took_and_gave_up_is_lost_all_the_same(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = asleep(uri, monkeypatch), Lease(uri, SECONDS)
    second.acquire()
    second.release()
    first._renew()  # it wakes up
    assert not first.held
    with pytest.raises(StorageError, match=r"has taken over the output \(it has finished since\)"):
        first.check()


def test_a_lease_of_the_same_number_is_anothers_where_its_holder_is(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = asleep(uri, monkeypatch), Lease(uri, SECONDS), Lease(uri, SECONDS)
    second.acquire()
    second.release()
    third.acquire()
    with pytest.raises(StorageError, match="has taken over the output"):
        first.check()  # it wakes up
    first.release()
    third.check()
    third.release()
    assert storage.list_files(uri) == ()


def test_what_is_given_up_is_not_brought_back_by_a_renewal_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease, under_way = Lease(str(tmp_path), SECONDS), threading.Event()
    lease.acquire()
    write = storage.write_text

    def slowly(uri: str, text: str, guard: Any) -> None:
        under_way.set()
        time.sleep(0.5)
        write(uri, text, guard)

    monkeypatch.setattr(storage, "write_text", slowly)
    assert under_way.wait(30)
    lease.release()
    assert storage.list_files(str(tmp_path)) == ()


def test_a_holder_that_died_on_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    dead = replace(this_process(), process=2**22 - 1, process_started="1")
    storage.write_text(f"{tmp_path}/1.json", dead.to_text())
    lease = Lease(str(tmp_path))
    started = time.monotonic()
    lease.acquire()
    assert time.monotonic() - started < 30  # of the 60 s of a lease
    assert [entry.path for entry in storage.list_files(str(tmp_path))] == ["1.json", "2.json"]
    lease.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 3}', '{"id": "a"}'])
def test_an_unreadable_lease_is_somebodys_until_it_expires(tmp_path: Path, text: str) -> None:
    storage.write_text(f"{tmp_path}/7.json", text)
    lease = Lease(str(tmp_path), 0.4)
    started = time.monotonic()
    lease.acquire()
    assert time.monotonic() - started >= 0.4
    assert lease.held
    lease.release()


def test_an_unreadable_lease_that_changes_is_a_living_jobs(tmp_path: Path) -> None:
    lease, ended = Lease(str(tmp_path), LIVING_SECONDS), threading.Event()
    storage.write_text(f"{tmp_path}/7.json", "{")

    def live() -> None:
        text = "{"
        while not ended.wait(0.1):
            text += "{"
            storage.write_text(f"{tmp_path}/7.json", text)

    living = threading.Thread(target=live)
    living.start()
    try:
        with pytest.raises(StorageError, match="another job is running"):
            lease.acquire()
    finally:
        ended.set()
        living.join()


def test_a_lease_with_keys_of_a_later_version_is_its_holders(tmp_path: Path) -> None:
    later = {**json.loads(this_process().to_text()), "color": "blue", "since": 7}
    storage.write_text(f"{tmp_path}/1.json", json.dumps(later))
    with pytest.raises(StorageError, match=rf"is running \(host {later['host']}, process "):
        Lease(str(tmp_path), 30).acquire()


def test_a_living_job_that_proc_hides_is_not_called_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with hidepid=2: another user's process can be asked for, and not looked at."""
    storage.write_text(f"{tmp_path}/1.json", this_process().to_text())
    lease = Lease(str(tmp_path), 0.6)
    monkeypatch.setattr(lease_holder, "_text", lambda path: "")

    def denied(process: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", denied)
    assert lease_holder.process_state(myself_of(tmp_path), lease._me.machine) == "unknown"
    started = time.monotonic()
    lease.acquire()  # nobody renews it, so it expires
    assert time.monotonic() - started >= 0.6
    lease.release()


def myself_of(folder: Path) -> lease_holder.LeaseHolder:
    return lease_holder.LeaseHolder.from_text((folder / "1.json").read_text())


def test_a_stopped_holder_on_this_machine_is_named_as_such(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert suspend(process.pid)
        started = lease_holder._state_and_start(process.pid)[1]
        stopped = replace(this_process(), process=process.pid, process_started=started)
        storage.write_text(f"{tmp_path}/1.json", stopped.to_text())
        with pytest.raises(StorageError, match=r"another job is stopped[^!]*continue it"):
            Lease(str(tmp_path), 30).acquire()
    finally:
        process.kill()
        process.wait()


def test_a_store_that_does_not_list_what_is_stored_ends_with_an_error(s3: S3) -> None:
    lease = Lease(s3.uri("o//c/.lease"), SECONDS)
    with pytest.raises(StorageError, match=r"(?s)its lease cannot be taken.*without empty"):
        lease.acquire()


def test_a_job_that_loses_its_output_while_it_stores_a_stage_calls_nothing_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunRecord(name="a", command="run", status="running", started="now")
    output = Output(uri=str(tmp_path / "out"), workdir=tmp_path / "work", run=run)
    output._lease = Lease(output.at(".lease"), SECONDS)
    output.acquire()
    (output.stages.local.create("prep") / "file").write_text("x")
    upload = storage.upload_tree

    def slowly(directory: Path, uri: str, **more: Any) -> None:
        upload(directory, uri, **more)
        storage.write_text(output.at(".lease/2.json"), this_process().to_text())
        while output.lease_held:
            time.sleep(0.01)

    monkeypatch.setattr(storage, "upload_tree", slowly)
    with pytest.raises(StorageError, match="another job has taken over the output"):
        output.stages.publish("prep", "f", "now", 1.0, {})
    assert output.stages.completed("prep", "f") is None
    with pytest.raises(StorageError, match="another job has taken over the output"):
        output.finish_run(complete=True)
    assert not storage.exists(output.at("_SUCCESS"))


@pytest.mark.parametrize("store", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_second_job_on_an_output_stops_with_a_clear_error_and_harms_nothing(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    if store == "s3":
        output = request.getfixturevalue("s3").uri("out")
    first = start(*small_run(output, "--set", "data.train.limit=100000", cache=tmp_path / "a"))
    assert first.stderr is not None
    for line in first.stderr:
        if "prep: started" in line:
            break
    while '"stage": "prep"' not in (before := storage.read_text(storage.join(output, "run.json"))):
        time.sleep(0.1)  # it is written right after that line
    second = job(*small_run(output, cache=tmp_path / "b"))
    assert second.code == 21, second.err
    assert f"{output}: another job is running (host " in second.err
    assert "fix: wait for it, stop it, or name another output" in second.err
    assert storage.read_text(storage.join(output, "run.json")) == before
    first.kill()
    first.communicate()

    # What a killed job left on this machine is taken over at once.
    third = job(*small_run(output, cache=tmp_path / "b"))
    assert third.code == 0, third.err
    assert not storage.list_files(storage.join(output, ".lease"))
    assert json.loads(storage.read_text(storage.join(output, "run.json")))["status"] == "succeeded"
