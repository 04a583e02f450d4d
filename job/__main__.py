"""`python -m job`, the entrypoint of the container."""

import os
import signal
import sys

USAGE, STOPPED = 2, 143  # as `job.errors` has them, which an older Python cannot read
SETUP = "make setup, then start it with .venv/bin/python -m job"


def _stopped(number: int, _: object) -> None:
    os.write(2, f"{signal.Signals(number).name}: stopped before anything was begun\n".encode())
    os._exit(STOPPED)


def _refuse(reason: str) -> None:
    sys.stderr.write(f"job: {sys.executable} {reason}. Fix: {SETUP}\n")
    sys.exit(USAGE)


if __name__ == "__main__":
    # The first process of a container gets no signal that it has no handler for, and what is
    # imported next takes a moment.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, _stopped)
    if sys.version_info < (3, 11):  # noqa: UP036 - whichever Python is called so
        _refuse("is Python {}.{}; the job needs 3.11 or 3.12".format(*sys.version_info))
    try:
        from job.cli.app import main
    except ModuleNotFoundError as error:
        if (error.name or "job").startswith("job"):
            raise
        _refuse(f"has no package {error.name}, which the job needs")
    main()
