"""Jobs that are stopped anywhere, taken over and continued: the run of the last one stays as it is.

Stopped (SIGSTOP) as a frozen container or a machine that sleeps is: they do not know of it. The
moments are drawn with a seed; JOB_KILL_SEED draws others.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO, cast

import pytest

from job import storage
from job.artifacts.lease_folder import LeaseFolder
from job.artifacts.writer import LEASES, SUCCESS
from job.cli.verify import verify
from tests import warm
from tests.conftest import S3
from tests.jobs import small_run
from tests.suspended import is_suspended, suspend

SEED = int(os.environ.get("JOB_KILL_SEED", "20"))
SECONDS = 3.0
"""Of a lease here, instead of a minute."""
LONGEST_SECONDS = 0.5
"""How far behind the line of its log a job is stopped, at most; never behind the next line."""
SAID = (
    *("run name=", "prep: started", "baseline: started", "train step=2", "checkpoint stored"),
    *("eval: started", "export: started", "uploaded eagerly", "report: started", "report: done"),
)
STOPPED = {"local": SAID[::2], "s3": (*SAID[1::2], *SAID[6:7])}
"""Where: a folder and a bucket are written to differently, yet by the same job."""
STOPPED_THERE = "another job is suspended in the middle of a write"
SETTINGS = {"data.train.limit": 24, "eval.max_samples": 4, "export.merged.max_shard_size": "1MB"}

# Forked from a process that has the libraries loaded: starting anew takes most of a small run.
context = get_context("forkserver")
context.set_forkserver_preload(["tests.integration.preload"])


class _Suspending:
    """Standard error of a job, which suspends itself `seconds` behind a line.

    It does so at the latest where it says the next of `SAID`: the job itself knows where it is,
    however fast it is and however late somebody else reads what it says.
    """

    def __init__(self, stream: TextIO, line: str, seconds: float) -> None:
        self._stream, self._line, self._seconds = stream, line, seconds
        self._next = SAID[SAID.index(line) + 1 :]
        self._begun, self._once = False, threading.Lock()

    def write(self, text: str) -> int:
        count = self._stream.write(text)
        if self._begun and any(line in text for line in self._next):
            self._suspend()
        elif self._line in text and not self._begun:
            self._begun = True
            timer = threading.Timer(self._seconds, self._suspend)
            timer.daemon = True
            timer.start()
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _suspend(self) -> None:
        if self._once.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGSTOP)


def _run(
    arguments: list[str],
    environ: dict[str, str],
    said: str,
    machine: str,
    stop: tuple[str, float] | None,
) -> None:
    """The job, in a process of its own, as if on a machine of its own."""
    warm.as_if_started()
    os.environ.update(environ)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    if stop is not None:
        sys.stderr = cast(TextIO, _Suspending(sys.stderr, *stop))
    from job.artifacts import lease, lease_holder
    from job.cli.app import app
    from job.errors import ReportedError
    from job.storage.backends import s3_writes

    s3_writes.PART = 5 * 2**20  # the least that S3 takes, so that a small model goes up in parts
    lease.LEASE_SECONDS = SECONDS
    lease.this_process = lambda: replace(lease_holder.this_process(), machine=machine, host=machine)
    from job import signals
    from job.cli import termination

    signals.install(termination.report)
    try:
        app(arguments, standalone_mode=False)
    except ReportedError as error:
        os.write(2, f"ended with {error}\n".encode())
        os._exit(error.exit_code)
    os._exit(0)


class Job:
    """One start of the job on the output that all share, with a cache of its own.

    It suspends itself at `stop`: behind a line, and how many seconds.
    """

    def __init__(
        self,
        output: str,
        place: Path,
        environ: dict[str, str],
        number: int,
        stop: tuple[str, float] | None,
    ) -> None:
        sets = [item for key, value in SETTINGS.items() for item in ("--set", f"{key}={value}")]
        arguments = small_run(output, *sets, "--verbose", cache=place / f"cache-{number}")
        self._said = place / f"said-{number}.txt"
        self._lease = LeaseFolder(storage.join(output, LEASES), SECONDS)
        self.fence = ""
        """Of the lease that it held when it was suspended."""
        self.process: Any = context.Process(
            target=_run, args=(arguments, environ, str(self._said), f"machine-{number}", stop)
        )
        self.process.start()

    def said(self) -> str:
        return self._said.read_text() if self._said.exists() else ""

    def halts(self) -> bool:
        """Waits until it has suspended itself; False if it ended, or had nothing left to write."""
        while not is_suspended(self.process.pid):
            if not self.process.is_alive():
                return False
            time.sleep(0.005)
        return self._holds_the_output()

    def writes_on(self, seconds: float) -> bool:
        """Goes on for so long; False if it ended, or has nothing left to write."""
        os.kill(self.process.pid, signal.SIGCONT)
        time.sleep(seconds)
        return suspend(self.process.pid) and self._holds_the_output()

    def _holds_the_output(self) -> bool:
        number, holder = self._lease.current()
        if holder is None:  # released: what is left is to leave the process
            os.kill(self.process.pid, signal.SIGCONT)
            return False
        self.fence = f"{number}-{holder.id}"
        return True

    def finish(self, seconds: float = 240) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


class Jobs:
    """Jobs on one output, each of which is suspended before the next begins."""

    def __init__(
        self, output: str, place: Path, environ: dict[str, str], draw: random.Random
    ) -> None:
        self._at, self._draw = (output, place, environ), draw
        self._started = list[Job]()
        self.suspended = list[Job]()
        self.in_a_write = 0
        """How often one stood in the way of the next: suspended in the middle of a write."""

    def begin(self, line: str | None) -> Job:
        """The next job, once it is suspended behind the line, or has ended."""
        while True:
            stop = None if line is None else (line, self._draw.random() * LONGEST_SECONDS)
            job = Job(*self._at, len(self._started), stop)
            self._started.append(job)
            if job.halts():
                self.suspended.append(job)
                return job
            if STOPPED_THERE not in job.said():
                return job
            # The one before holds the lock of the disk: a takeover has to wait for its write.
            self.in_a_write += 1
            if not self.suspended[-1].writes_on(self._draw.random() * 0.1):
                before = self.suspended.pop()
                assert before.finish() == 0, before.said()

    def kill(self) -> None:
        for job in self._started:
            job.process.kill()


def bytes_at(output: str) -> dict[str, bytes]:
    """All that is at the output but for the leases."""
    return {
        entry.path: storage.read_bytes(storage.join(output, entry.path))
        for entry in storage.list_files(output)
        if not entry.path.startswith(".lease/")
    }


@pytest.mark.slow(minutes=2)
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("store", ["local", "s3"])
def test_what_the_last_job_finished_stays_when_those_it_took_over_from_go_on(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    output, environ = str(tmp_path / "out"), dict[str, str]()
    if store == "s3":
        s3: S3 = request.getfixturevalue("s3")
        output, environ = s3.uri("out"), s3.environ
    jobs = Jobs(output, tmp_path, environ, random.Random(f"{SEED} {store}"))
    lines = [line for line in SAID if line in STOPPED[store]]
    try:
        for line in lines:
            job = jobs.begin(line)
            if job not in jobs.suspended:  # one that was to be stopped at its end may come to it
                assert line == SAID[-1], job.said()
                assert job.finish() == 0, job.said()
        last = jobs.begin(None)
        assert last.finish() == 0, last.said()
        stopped = jobs.suspended
        assert len(stopped) >= len(lines) - 1
        assert verify(output).files > 10
        before = bytes_at(output)
        assert json.loads(before["run.json"])["status"] == "succeeded"
        finisher = json.loads(before[SUCCESS])["lease"]
        for number, job in enumerate(stopped):
            if number % 2:  # Kubernetes asks it to stop before it goes on
                os.kill(job.process.pid, signal.SIGTERM)
            os.kill(job.process.pid, signal.SIGCONT)
        codes = [job.finish() for job in stopped]
        for job, code in zip(stopped, codes, strict=True):
            # One that had written `_SUCCESS` before it was stopped has nothing more to write.
            assert code in (21, 143) or (code == 0 and job.fence == finisher), job.said()
            assert code != 21 or "another job has taken over the output" in job.said()
        assert bytes_at(output) == before
        assert verify(output).files > 10
        print(f"{store}: {len(stopped)} jobs stopped, {jobs.in_a_write} times in a write")
        print(f"they ended with {codes}")
    finally:
        jobs.kill()
