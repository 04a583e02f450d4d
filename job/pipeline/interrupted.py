"""Describes what the next run can reuse of a stopped one."""

import os
import shlex
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from job.distributed.world import World
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
    """What starts the job again, with its command quoted for a shell.

    Of several processes it is their launcher's: one process alone takes fewer rows a step, so it
    could use neither their checkpoints nor the adapter that they have trained.
    """
    world = World.from_environment(os.environ)
    if world.is_single:
        return shlex.join(sys.orig_argv)
    if (launcher := _launcher()) is None:
        return f"{shlex.join(sys.orig_argv)}, in {world.size} processes again"
    on_one_node = os.environ.get("LOCAL_WORLD_SIZE") == f"{world.size}"
    return shlex.join(launcher) + ("" if on_one_node else ", and as before on the other nodes")


def _launcher() -> list[str] | None:
    """The command line of torchrun, if it is this process's parent and can be read."""
    arguments = sys.argv[1:]
    with suppress(OSError, UnicodeDecodeError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text("utf-8").split("\0")[:-1]
        if "TORCHELASTIC_RUN_ID" in os.environ and words[-len(arguments) :] == arguments:
            return words
    return None


def _newest_step(checkpoints: CheckpointStore) -> int | None:
    steps: list[int | None] = []

    def look_up() -> None:
        with suppress(JobError):
            steps.append(checkpoints.newest())

    thread = threading.Thread(target=look_up, name="newest checkpoint", daemon=True)
    thread.start()
    thread.join(LOOKUP_SECONDS)
    return steps[0] if steps else None
