"""Nothing is written or removed at an output but through its writer, under its lease."""

import ast
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job import storage
from job.artifacts.lease import LateWrite, Lease, LeaseLost
from job.artifacts.output import Output
from job.artifacts.records import RunRecord
from job.artifacts.writer import Writer
from job.errors import StorageError
from job.storage import local
from tests.conftest import S3
from tests.jobs import ROOT
from tests.suspended import suspend

JOB = ROOT / "job"
INCOMPLETE_PREFIX = (
    *("write_bytes", "write_text", "write_new", "upload", "upload_tree", "copy_tree"),
    *("delete", "delete_tree", "delete_unfinished"),
)
STORAGE = ("storage", "files", "trees", "local", "remote", "s3")
ALLOWED = {
    "artifacts/writer.py": "it is the way",
    "cli/commands/init.py": "a spec, which the user names",
    "cli/commands/parity.py": "a record, which the user names",
    "evaluation/comparison/page.py": "a page, which may lie in no run's folders",
    "artifacts/lease.py": "the lease itself, each write of which looks first",
    "prep/chunks.py": "this machine's working folder",
    "telemetry/prometheus.py": "a local file, which may not lie in the output",
}
SECONDS = 0.8  # of a lease


@functools.cache
def nodes() -> dict[str, tuple[ast.AST, ...]]:
    """Everything in the code of the job but for `storage` itself, by file."""
    return {
        path.relative_to(JOB).as_posix(): tuple(ast.walk(ast.parse(path.read_text("utf-8"))))
        for path in sorted(JOB.rglob("*.py"))
        if "storage" not in path.relative_to(JOB).parts
    }


def test_only_the_writer_and_the_lease_write_to_storage() -> None:
    """By name: a function of `storage` that writes is called, handed on or imported."""
    found = {
        path
        for path, every in nodes().items()
        for node in every
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in STORAGE
        and node.attr in INCOMPLETE_PREFIX
    }
    assert found == set(ALLOWED)
    imported = {
        alias.name
        for every in nodes().values()
        for node in every
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("job.storage")
        for alias in node.names
    }
    assert imported.isdisjoint({*INCOMPLETE_PREFIX, "files", "remote", "s3"})


def calls_of(name: str) -> list[tuple[str, ast.Call]]:
    """Where in the job something of that name is made."""
    return [
        (path, node)
        for path, every in nodes().items()
        for node in every
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name
    ]


def test_what_the_job_stores_at_an_output_has_the_writer_of_the_output() -> None:
    stores = [ast.unparse(made) for _, made in calls_of("CheckpointStore")]
    assert ["writer=self.output.writer.inside(" in store for store in stores] == [True, True]
    [(_, trackers)] = calls_of("TrackerFiles")
    assert "output.uploader_for(logs)" in ast.unparse(trackers)
    without = [path for path, made in calls_of("Writer") if "lease=None" in ast.unparse(made)]
    assert without == [
        "artifacts/output.py",  # a tracker's files at a place outside of the output
        "train/checkpoint/storage.py",  # parts on other machines than that which holds the lease
        *(
            "train/checkpoint/storage.py",
            "train/trackers.py",
        ),  # made without a writer, as benchmarks do
    ]


def test_trackers_files_in_the_output_go_under_its_lease_however_it_is_spelled(
    tmp_path: Path,
) -> None:
    run = RunRecord(name="r", command="run", status="running", started="now")
    output = Output(uri=str(tmp_path / "out"), workdir=tmp_path / "work", run=run)
    output.acquire()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "events").write_text("events")
    inside = [output.at("logs"), f"file://{tmp_path}/out/../out/mine", f"{tmp_path}/link/other"]
    outside = f"{tmp_path}/out-logs"
    for uri in (*inside, outside):
        output.uploader_for(uri)(tmp_path / "events", "tensorboard/events")
        assert storage.read_text(f"{uri}/tensorboard/events") == "events"
    output.release()
    output.uploader_for(outside)(tmp_path / "events", "again")
    for uri in inside:
        with pytest.raises(StorageError, match="nothing is written without the output's lease"):
            output.uploader_for(uri)(tmp_path / "events", "again")


@pytest.fixture(params=["local", "s3", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        return s3.uri("run")
    return f"memory://{tmp_path}/run" if request.param == "memory" else str(tmp_path / "run")


def asleep(uri: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Lease, Writer]:
    """A job of another machine that took the output and was then put to sleep."""
    lease = Lease(f"{uri}/.lease", SECONDS)
    lease._me = replace(lease._me, machine="another", host="another")
    with monkeypatch.context() as patched:
        patched.setattr(Lease, "_renew", lambda self: None)
        lease.acquire()
    return lease, Writer(uri, lease)


def taken_over(uri: str) -> Lease:
    lease = Lease(f"{uri}/.lease", SECONDS)
    lease.acquire()
    return lease


WRITES: dict[str, Callable[[Writer, Path], None]] = {
    "write": lambda writer, _: writer.write_text("run.json", "first"),
    "upload": lambda writer, file: writer.upload(file, "merged/model"),
    "upload of a tree": lambda writer, file: writer.upload_tree(file.parent),
    "link": lambda writer, file: writer.publish(file.with_name("large"), "merged/model"),
    "upload in parts": lambda writer, file: writer.upload(file.with_name("large"), "merged/model"),
    "delete": lambda writer, _: writer.delete("_SUCCESS"),
    "delete of a tree": lambda writer, _: writer.delete_tree("merged"),
    "checkpoint": lambda writer, _: writer.inside("checkpoints", "step-1").write_text("a", "first"),
}


def small_files(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model").write_text("first")
    (folder / "large").write_bytes(bytes(17 * 2**20))
    return folder / "model"


def contents(uri: str) -> dict[str, bytes]:
    return {
        entry.path: storage.read_bytes(f"{uri}/{entry.path}")
        for entry in storage.list_files(uri)
        if not entry.path.startswith(".lease/")
    }


def test_who_lost_the_lease_can_do_nothing_at_the_output(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small_files(tmp_path / "files")
    first, writer = asleep(uri, monkeypatch)
    writer.write_text("run.json", "first")
    second = taken_over(uri)
    for path in ("run.json", "merged/model", "_SUCCESS", "checkpoints/step-1/a"):
        Writer(uri, second).write_text(path, "second")
    before = contents(uri)
    for write in WRITES.values():  # it wakes up
        with pytest.raises(LeaseLost, match="another job has taken over the output"):
            write(writer, file)
    assert contents(uri) == before
    second.release()
    for write in WRITES.values():  # the same where the other is done since
        with pytest.raises(LeaseLost, match="it has finished since"):
            write(writer, file)
    assert contents(uri) == before
    assert not first.held


def test_nothing_is_written_before_the_lease_is_taken_or_after_it_is_given_up(
    uri: str, tmp_path: Path
) -> None:
    file = small_files(tmp_path / "files")
    lease = Lease(f"{uri}/.lease", SECONDS)
    for state in ("before", "after"):
        for write in WRITES.values():
            with pytest.raises(StorageError, match="nothing is written without the output's lease"):
                write(Writer(uri, lease), file)
        if state == "before":
            lease.acquire()
            lease.release()
    assert contents(uri) == {}


@pytest.mark.parametrize("write", sorted(set(WRITES) - {"upload of a tree", "link"}))
def test_s3_refuses_what_was_sent_before_a_takeover_and_arrives_after_it(
    write: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job stands still between its last look and the request, while another does its work."""
    uri, file = s3.uri("run"), small_files(tmp_path / "files")
    storage.upload(file, f"{uri}/merged/model")
    storage.write_text(f"{uri}/_SUCCESS", "before")
    lease, writer = asleep(uri, monkeypatch)
    assert lease.conditions == storage.Conditions(puts=True, completes=True, deletes=True)
    before, others = dict[str, bytes](), list[Lease]()
    look = Lease.ensure

    def ensure(self: Lease) -> None:
        look(self)
        caller = sys._getframe(1).f_code.co_name
        if self is lease and caller == "writing" and not before:
            second = taken_over(uri)
            others.append(second)
            for path in ("run.json", "merged/model", "merged/large", "_SUCCESS", "model", "large"):
                Writer(uri, second).write_text(path, f"second's {path}")
            Writer(uri, second).write_text("checkpoints/step-1/a", "second's")
            before.update(contents(uri))

    monkeypatch.setattr(Lease, "ensure", ensure)
    with pytest.raises(LeaseLost):
        WRITES[write](writer, file)
    assert before
    assert contents(uri) == before
    others[0].release()


@pytest.mark.parametrize("finished", ["before", "after"])
def test_where_a_store_lets_a_late_write_through_no_success_stands_over_it(
    finished: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Memory knows neither locks nor conditions, as some object stores do not."""
    uri = f"memory://{tmp_path}/run"
    first, writer = asleep(uri, monkeypatch)
    run = RunRecord(name="r", command="run", status="running", started="now")
    second = Output(uri=uri, workdir=tmp_path / "work", run=run)
    second._lease = Lease(second.at(".lease"), SECONDS)

    def make() -> None:
        second.stages.invalidate("export")
        (second.stages.local.create("export") / "model").write_text("second")
        run.stages["export"] = second.stages.publish("export", "f", "now", 1.0, {})

    look = Lease.ensure

    def ensure(self: Lease) -> None:
        look(self)
        if self is first and not run.stages:
            second.acquire()
            make()
            if finished == "before":
                second.finish_run(complete=True)

    monkeypatch.setattr(Lease, "ensure", ensure)
    with pytest.raises(LateWrite):
        writer.write_text("model", "first's, too late")
    assert storage.read_text(f"{uri}/model") == "first's, too late"
    assert "a file was written while another job took" in capsys.readouterr().err
    if finished == "after":
        with pytest.raises(StorageError, match="model: another job wrote over it"):
            second.finish_run(complete=True)
    assert not storage.is_file(f"{uri}/_SUCCESS")
    second.release()
    again = Output(uri=uri, workdir=tmp_path / "work", run=run)
    again.acquire()
    assert again.stages.completed("export", "f") is None  # so it is made anew
    again.release()


HOLDER = """
import sys, time
from job.artifacts.lease import Lease
from job.storage import local
from job.artifacts.writer import Writer
uri = sys.argv[1]
lease = Lease(f"{uri}/.lease", 1.0)
lease._me = __import__("dataclasses").replace(lease._me, machine="another")
lease.acquire()
check = Lease.check
def held_up(self):
    check(self)
    if sys._getframe(1).f_code.co_name == "writing":
        print("looked", flush=True)
        sys.stdin.readline()
Lease.check = held_up
Writer(uri, lease).write_text("run.json", "first")
print("written", flush=True)
time.sleep(60)
"""


def taken_over_from(process: subprocess.Popen[str], uri: str) -> Lease:
    """The lease of a job that was suspended before, and not in, one of its renewals' writes."""
    while True:
        assert suspend(process.pid)
        lease = Lease(f"{uri}/.lease", 1.0)
        try:
            lease.acquire()
            return lease
        except StorageError as error:
            if "is suspended in the middle of a write" not in str(error):
                raise
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.05)


def test_on_a_disk_nobody_takes_over_between_a_look_and_the_write(tmp_path: Path) -> None:
    """A job that is stopped right there is named; when it goes on, the takeover comes after it."""
    uri = str(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, uri],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "looked\n"
        assert suspend(process.pid)
        with pytest.raises(StorageError, match="is suspended in the middle of a write"):
            Lease(f"{uri}/.lease", 1.0).acquire()
        assert not Path(uri, "run.json").exists()
        os.kill(process.pid, signal.SIGCONT)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "written\n"
        second = taken_over_from(process, uri)
        Writer(uri, second).write_text("run.json", "second")
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.5)
        assert Path(uri, "run.json").read_text() == "second"
        second.check()
        second.release()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def test_a_lock_is_shared_by_writers_and_alone_for_a_takeover(tmp_path: Path) -> None:
    path = tmp_path / ".lease-lock"
    with (
        local.locked(path, exclusive=False, seconds=1) as one,
        local.locked(path, exclusive=False, seconds=1) as two,
    ):
        assert one
        assert two
        with pytest.raises(TimeoutError), local.locked(path, exclusive=True, seconds=0.05):
            pass
    with local.locked(path, exclusive=True, seconds=1) as alone:
        assert alone
    with local.locked(tmp_path / "none" / "lock", exclusive=True, seconds=1) as alone:
        assert not alone
    assert storage.list_files(str(tmp_path)) == ()


def test_a_renewal_that_slipped_past_another_job_gives_the_lease_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would bring the first job's lease back when the second is done."""
    uri = f"memory://{tmp_path}/run"
    first, writer = asleep(uri, monkeypatch)
    write = storage.write_text

    def late(place: str, text: str, guard: Any = storage.UNGUARDED) -> None:
        if threading.current_thread() is not threading.main_thread():
            write(place, text, guard)
            return
        with guard.writing(place):  # it looks, and then
            taken_over(uri).release()
            write(place, text)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_text", late)
        first._renew()
    assert not first.held
    with pytest.raises(LeaseLost):
        writer.write_text("run.json", "first")
    assert json.dumps(contents(uri)) == "{}"
    taken_over(uri).release()
