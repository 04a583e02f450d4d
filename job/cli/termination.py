"""The end of the job's process: what is said of an error, to whom, and the exit code."""

import atexit
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import typer

from job import log, redaction, signals
from job.errors import STOPPED, USAGE, OutOfMemoryError, ReportedError

TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_LIMIT = 4096  # bytes that the kubelet reads of it
DEBUG = "--debug"


def report(error: ReportedError) -> int:
    """Says what is wrong and leaves it for the kubelet; gives the exit code."""
    if DEBUG in sys.argv:
        redaction.print_traceback(error)
    text = redaction.shown(str(error))  # with what became known after it was made
    if log.is_json():
        for problem in error.problems:
            known = {key: value for key, value in asdict(problem).items() if value is not None}
            log.error(error.title, exit_code=error.exit_code, **known)
    else:
        log.error(f"{error.title} (exit {error.exit_code})")
        print(text, file=sys.stderr)
    leave_for_the_kubelet(f"{error.title}\n{text}")
    return error.exit_code


def report_usage(error: typer.TyperException) -> int:
    """Says what the command line lacks; gives the exit code."""
    error.message = redaction.shown(error.message)
    code: int = getattr(error, "exit_code", USAGE)
    leave_for_the_kubelet(f"usage\n{error.message}")
    if log.is_json():
        log.error("usage", exit_code=code, message=error.message)
    elif log.is_terminal(sys.stderr):
        from typer.rich_utils import rich_format_error  # 60 ms that valid commands need not pay

        rich_format_error(error)  # type: ignore[arg-type]
    else:
        error.show()  # type: ignore[attr-defined]
    return code


def leave_for_the_kubelet(text: str) -> None:
    """Writes it to where `kubectl describe` shows it from, if there is such a place."""
    message = redaction.shown(text).encode()[:TERMINATION_LIMIT]
    with suppress(OSError):  # a full disk must not hide what happened, nor its exit code
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_bytes(message.decode(errors="ignore").encode())


def leave(code: int) -> NoReturn:
    """Ends the process, at once where its libraries' farewells would take time or fail."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == OutOfMemoryError.exit_code:
        os._exit(code)  # they need memory too, and fail loudly without
    if code == STOPPED:
        signals.leave(code)  # a transfer under way may take longer than there is
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Threads of torch's process groups can outlive these, and abort a process that is done.
        atexit._run_exitfuncs()  # trackers'
        signals.leave(code)
    sys.exit(code)
