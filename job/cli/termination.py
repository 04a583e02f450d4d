"""Ends the process: reports the error, writes the termination message, exits with its code."""

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
from job.local import daemon_threads

TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_LIMIT = 4096  # bytes that the kubelet reads
DEBUG = "--debug"


def report(error: ReportedError) -> int:
    """Reports an error, also as the pod's termination message. Returns the exit code."""
    if DEBUG in sys.argv:
        redaction.print_traceback(error)
    text = redaction.shown(str(error))
    if log.is_json():
        for problem in error.problems:
            known = {key: value for key, value in asdict(problem).items() if value is not None}
            log.error(error.title, exit_code=error.exit_code, **known)
    else:
        log.error(f"{error.title} (exit {error.exit_code})")
        print(text, file=sys.stderr)
    write_termination_log(f"{error.title}\n{text}")
    return error.exit_code


def report_usage(error: typer.TyperException) -> int:
    """Reports a command line that cannot be parsed. Returns the exit code."""
    error.message = redaction.shown(error.message)
    code: int = getattr(error, "exit_code", USAGE)
    write_termination_log(f"usage\n{error.message}")
    if log.is_json():
        log.error("usage", exit_code=code, message=error.message)
    elif log.is_terminal(sys.stderr):
        from typer.rich_utils import rich_format_error  # 60 ms that valid commands save

        rich_format_error(error)  # type: ignore[arg-type]
    else:
        error.show()  # type: ignore[attr-defined]
    return code


def write_termination_log(text: str) -> None:
    """Writes the pod's termination message, which `kubectl describe` shows, if this is a pod."""
    message = redaction.shown(text).encode()[:TERMINATION_LIMIT]
    with suppress(OSError):  # a full disk must hide neither the error nor its exit code
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_bytes(message.decode(errors="ignore").encode())


def exit_with(code: int) -> NoReturn:
    """Exits with `code`; skips exit handlers of libraries if they could hang or fail."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == OutOfMemoryError.exit_code:
        os._exit(code)  # exit handlers would fail without memory, and print tracebacks
    if code == STOPPED:
        signals.exit_now(code)  # a transfer in progress may outlast the grace period
    if os.environ.get("WORLD_SIZE", "1") != "1" or daemon_threads.any_runs():
        # Threads of torch's process groups can outlive exit handlers and abort a finished process;
        # so can a thread that is amid imports.
        atexit._run_exitfuncs()  # trackers need theirs
        signals.exit_now(code)
    sys.exit(code)
