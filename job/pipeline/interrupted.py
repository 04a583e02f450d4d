"""Describes what the next run can reuse of a stopped one."""

import shlex
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from job.errors import JobError
from job.train.checkpoint.storage import CheckpointStore

LOOKUP_SECONDS = 1.0
"""How long to wait for a listing of checkpoints: a stopped job has little time left."""


def describe_kept(complete: Sequence[str], checkpoints: CheckpointStore | None) -> str:
    """The stages that the next run skips, and the checkpoint from which it resumes."""
    if not complete:
        return "nothing: no stage has completed"
    kept = f"{'stage' if len(complete) == 1 else 'stages'} {', '.join(complete)}"
    step = _newest_step(checkpoints) if checkpoints is not None else None
    if checkpoints is not None and step is not None:
        kept += f"; checkpoint {checkpoints.at(step)}"
    return kept


def same_command() -> str:
    """The command that started this process, quoted for a shell."""
    return shlex.join(sys.orig_argv)


def _newest_step(checkpoints: CheckpointStore) -> int | None:
    steps: list[int | None] = []

    def look_up() -> None:
        with suppress(JobError):
            steps.append(checkpoints.newest())

    thread = threading.Thread(target=look_up, name="newest checkpoint", daemon=True)
    thread.start()
    thread.join(LOOKUP_SECONDS)
    return steps[0] if steps else None
