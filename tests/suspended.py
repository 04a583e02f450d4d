"""Processes that are suspended (SIGSTOP), as a frozen container is."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def suspend(process: int) -> bool:
    """Suspends the process and waits until all of its threads stand still; False if it has ended.

    The signal alone does not say when: a thread may still complete the call that it is in.
    """
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGSTOP)
        while not is_suspended(process):
            if has_ended(process):
                return False
            time.sleep(0.001)
        return True
    return False


def is_suspended(process: int) -> bool:
    """Whether all threads of the process stand still."""
    try:
        threads = os.listdir(f"/proc/{process}/task")  # noqa: PTH208 - which is gone with it
    except FileNotFoundError:
        return False
    states = {_state(Path(f"/proc/{process}/task/{thread}/stat")) for thread in threads}
    return "T" in states and states <= {"T", ""}


def has_ended(process: int) -> bool:
    """Whether the process is gone, or waits for its parent only."""
    return _state(Path(f"/proc/{process}/stat")) in ("", "Z", "X")


def _state(stat: Path) -> str:
    """The letter of a process or thread; empty if there is none (any more)."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
