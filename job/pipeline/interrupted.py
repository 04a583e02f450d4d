"""What a stopped run leaves to the next one, in words."""

import shlex
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from job.errors import JobError
from job.train.checkpoint.storage import CheckpointStore

SECONDS = 1.0
"""How long a store may take to say which checkpoints it has: who was asked to stop has few."""


def kept(complete: Sequence[str], checkpoints: CheckpointStore | None) -> str:
    """The stages that the next run skips, and the checkpoint that it goes on from."""
    said = f"the stages {', '.join(complete)}" if complete else "nothing: no stage has completed"
    step = _newest(checkpoints) if checkpoints is not None else None
    if checkpoints is not None and step is not None:
        said += f", and the checkpoint {checkpoints.at(step)}"
    return said


def same_command() -> str:
    """The command that this process was started with, for a shell."""
    return shlex.join(sys.orig_argv)


def _newest(checkpoints: CheckpointStore) -> int | None:
    found: list[int | None] = []

    def look() -> None:
        with suppress(JobError):
            found.append(checkpoints.newest())

    thread = threading.Thread(target=look, name="kept", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else None
