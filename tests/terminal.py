"""A command on a terminal: what it says to a person, byte by byte."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import warm
from tests.jobs import ROOT, Running


@dataclass(frozen=True)
class Shown:
    code: int
    text: str
    """With its control sequences."""


def job_on_terminal(
    *arguments: str,
    environ: Mapping[str, str] | None = None,
    interrupt_at: str | None = None,
    hold: str | None = None,
) -> Shown:
    """Runs `python -m job` on a terminal of 80 columns; Ctrl-C where it says `interrupt_at`.

    With `hold` it waits at that step for it. Else it is forked from a process with the libraries
    loaded if its environment allows that.
    """
    variables = {"JOB_STORAGE_RETRIES": "1", **(environ or {})}
    if hold is not None or not warm.fits(_environ(variables)):
        module = ["job"] if hold is None else ["tests.held", hold]
        command = [sys.executable, "-m", *module, *arguments]
        return on_terminal(command, environ=variables, interrupt_at=interrupt_at)
    ours, theirs = _terminal(80)
    process = warm.Process(
        arguments,
        cwd=ROOT,
        environ=_environ(variables),
        err=subprocess.DEVNULL,
        terminal=theirs,
    )
    os.close(theirs)
    return _follow(process, ours, interrupt_at=interrupt_at)


def on_terminal(
    command: Sequence[str],
    *,
    columns: int = 80,
    cwd: Path = ROOT,
    environ: Mapping[str, str] | None = None,
    interrupt_at: str | None = None,
    type_in: Callable[[str], str | None] = lambda _: None,
    seconds: float = 300,
) -> Shown:
    """Runs the command on a terminal of its own.

    `type_in` is asked for keys to press whenever something new was shown.
    """
    ours, theirs = _terminal(columns)
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=_environ(environ or {}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that ^C is a signal
    )
    os.close(theirs)
    return _follow(process, ours, interrupt_at=interrupt_at, type_in=type_in, seconds=seconds)


def _terminal(columns: int) -> tuple[int, int]:
    """Our end of a new terminal, and that of the command."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    return ours, theirs


def _environ(more: Mapping[str, str]) -> dict[str, str]:
    known = {key: text for key, text in os.environ.items() if key not in _STEERING}
    return {**known, "TERM": "xterm-256color", **more}


def _follow(
    process: Running,
    ours: int,
    *,
    interrupt_at: str | None = None,
    type_in: Callable[[str], str | None] = lambda _: None,
    seconds: float = 300,
) -> Shown:
    """Reads what is shown until the process ends."""
    shown, end = b"", time.monotonic() + seconds
    while time.monotonic() < end:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            found = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not found:
            break
        shown += found
        text = shown.decode(errors="replace")
        if interrupt_at is not None and interrupt_at in text:
            interrupt_at = None
            os.write(ours, b"\x03")
        if keys := type_in(text):
            os.write(ours, keys.encode())
    else:
        os.killpg(process.pid, signal.SIGKILL)
    os.close(ours)
    return Shown(process.wait(), shown.decode(errors="replace").replace("\r\n", "\n"))


# What of this process's environment would decide how a terminal is used.
_STEERING = {"NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERM", "COLUMNS", "LINES"}
