"""Jobs that are stopped anywhere, taken over and continued: the run of the last one stays as it is.

Stopped (SIGSTOP) as a frozen container or a machine that sleeps is: they do not know of it. The
moments are drawn with a seed; JOB_KILL_SEED draws others.
"""

import json
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from job import storage
from job.artifacts.lease_folder import LeaseFolder
from job.artifacts.writer import LEASES
from job.cli.verify import verify
from tests import warm
from tests.conftest import S3
from tests.jobs import small_run

SEED = int(os.environ.get("JOB_KILL_SEED", "20"))
SECONDS = 3.0
"""Of a lease here, instead of a minute."""
LONGEST_SECONDS = 0.5
"""How far behind the line of its log a job is stopped."""
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


def _run(arguments: list[str], environ: dict[str, str], said: str, machine: str) -> None:
    """The job, in a process of its own, as if on a machine of its own."""
    warm.as_if_started()
    os.environ.update(environ)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
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
    """One start of the job on the output that all share, with a cache of its own."""

    def __init__(self, output: str, place: Path, environ: dict[str, str], number: int) -> None:
        sets = [item for key, value in SETTINGS.items() for item in ("--set", f"{key}={value}")]
        arguments = small_run(output, *sets, "--verbose", cache=place / f"cache-{number}")
        self._said = place / f"said-{number}.txt"
        self._lease = LeaseFolder(storage.join(output, LEASES), SECONDS)
        self.process: Any = context.Process(
            target=_run, args=(arguments, environ, str(self._said), f"machine-{number}")
        )
        self.process.start()

    def said(self) -> str:
        return self._said.read_text() if self._said.exists() else ""

    def stop_at(self, line: str, after: float) -> bool:
        """Stops it behind the line; False where it ended before, or never came there."""
        while line not in self.said():
            if not self.process.is_alive():
                return False
            time.sleep(0.005)
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGSTOP)
            if not self._lease.numbers():  # released: what is left is to leave the process
                os.kill(self.process.pid, signal.SIGCONT)
                return False
        return bool(self.process.is_alive())

    def finish(self, seconds: float = 240) -> int | None:
        self.process.join(seconds)
        return self.process.exitcode


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
    draw, stopped, between = random.Random(f"{SEED} {store}"), list[Job](), 0
    lines = [line for line in SAID if line in STOPPED[store]]
    try:
        for number, line in enumerate(lines):
            job = Job(output, tmp_path, environ, number)
            halted = job.stop_at(line, draw.random() * LONGEST_SECONDS)
            while not halted and STOPPED_THERE in job.said():
                # The one before holds the lock of the disk: a takeover has to wait for its write.
                between += 1
                os.kill(stopped[-1].process.pid, signal.SIGCONT)
                time.sleep(draw.random() * 0.1)
                os.kill(stopped[-1].process.pid, signal.SIGSTOP)
                job = Job(output, tmp_path, environ, number)
                halted = job.stop_at(line, draw.random() * LONGEST_SECONDS)
            if halted:
                stopped.append(job)
            else:  # a job that was to be stopped at its end may have come to it
                assert line in SAID[-2:], job.said()
                assert job.finish() == 0, job.said()
        assert len(stopped) >= len(lines) - 1
        last = Job(output, tmp_path, environ, len(lines))
        assert last.finish() == 0, last.said()
        assert verify(output).files > 10
        before = bytes_at(output)
        run = json.loads(before["run.json"])
        assert run["status"] == "succeeded"
        for number, job in enumerate(stopped):
            if number % 2:  # Kubernetes asks it to stop before it goes on
                os.kill(job.process.pid, signal.SIGTERM)
            os.kill(job.process.pid, signal.SIGCONT)
        codes = [job.finish() for job in stopped]
        for job, code in zip(stopped, codes, strict=True):
            assert code in (21, 143), job.said()
            assert code == 143 or "another job has taken over the output" in job.said()
        assert bytes_at(output) == before
        assert verify(output).files > 10
        print(f"{store}: {len(stopped)} jobs stopped and taken over, {between} of them in a write")
        print(f"they ended with {codes}")
    finally:
        for job in stopped:
            with suppress(ProcessLookupError, AttributeError):
                os.kill(job.process.pid, signal.SIGKILL)
