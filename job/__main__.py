"""`python -m job`, the entrypoint of the container, and `job`, the console script."""

import os
import signal
import sys

USAGE, STOPPED = 2, 143  # those of `job.errors`, which an older Python cannot parse
SETUP = "make setup, then start it with .venv/bin/python -m job"
INSTALL = "pip install the project's folder or wheel, which brings what it needs"


def main() -> None:
    """Starts the command line, or says in one line what this Python lacks."""
    # The first process of a container gets no signal that it has no handler for, and the imports
    # below take a moment.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, _stop)
    if sys.version_info < (3, 11):  # noqa: UP036 - any Python may be called here
        _refuse("is Python {}.{}; the job needs 3.11 or 3.12".format(*sys.version_info))
    try:
        from job.cli.app import main as command_line
    except ModuleNotFoundError as error:
        if (error.name or "job").startswith("job"):
            raise
        _refuse(f"has no package {error.name}, which the job needs")
    command_line()


def _stop(number: int, _: object) -> None:
    os.write(2, f"{signal.Signals(number).name}: stopped before the job started\n".encode())
    os._exit(STOPPED)


def _refuse(reason: str) -> None:
    checkout = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120
    fix = SETUP if os.path.exists(os.path.join(checkout, "Makefile")) else INSTALL  # noqa: PTH110, PTH118
    sys.stderr.write(f"job: {sys.executable} {reason}. Fix: {fix}\n")
    sys.exit(USAGE)


if __name__ == "__main__":
    main()
