"""How the work ends: by the first error, whichever thread found it."""

import subprocess
import sys

from tests.jobs import ROOT

ABANDONED_FROM_A_THREAD = """
import sys, threading
from job import signals
from job.errors import SpecError, StorageError, reported

released = threading.Event()

def report(error):
    print(error.title, flush=True)

def release(error):
    released.set()
    failed.wait(2)  # by then the work has failed too

failed = threading.Event()
signals.install(report)
failure = reported(SpecError("$.x", "is wrong in rank 1"))
with signals.on_abandon(release):
    threading.Thread(target=signals.abandon, args=(failure,)).start()
    try:
        released.wait()
        raise StorageError("s3://bucket/lease", "was given back")
    except StorageError as error:
        failed.set()
        report(reported(signals.cause_of(error)))
        sys.exit(error.exit_code)
"""


def test_what_fails_because_the_work_was_abandoned_is_not_what_ended_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED_FROM_A_THREAD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (10, "invalid spec\n"), done.stderr
