"""SIGTERM and SIGINT, as a job on a cluster has to take them.

Outside training the signal ends the work where it is, by an exception; what is stored is whole
by the way it is stored. During training it is remembered, and the trainer stops after the step
with a checkpoint. A second signal ends the process at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from job import log
from job.errors import STOPPED, Stopped, UsageError

GRACE_VARIABLE = "JOB_GRACE_SECONDS"
"""The environment variable that tells how long after SIGTERM the job is left alive."""
GRACE_SECONDS = 30.0
"""Kubernetes' own, unless the pod says otherwise."""


@dataclass
class _State:
    received: str | None = None
    deferred: bool = False


_state = _State()


def install() -> None:
    """From now on SIGTERM and SIGINT are handled; a no-op outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    _state.received = None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)


def received() -> str | None:
    """The name of the signal that asked the job to stop, if one has."""
    return _state.received


def grace_seconds() -> float:
    """How long after SIGTERM the job is left alive. Raises UsageError for what is no number."""
    text = os.environ.get(GRACE_VARIABLE, "").strip()
    try:
        return float(text) if text else GRACE_SECONDS
    except ValueError:
        raise UsageError(
            GRACE_VARIABLE, "must be a number of seconds", value=text, fix="set it to 30, say"
        ) from None


def check() -> None:
    """Raises Stopped where a signal came while it was deferred and nothing has taken it up."""
    if _state.received is not None:
        raise _stopped(_state.received)


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal is only remembered, for `received` to tell."""
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False


def _handle(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if _state.received is not None:
        os.write(2, f"{name} again: leaving at once\n".encode())
        os._exit(STOPPED)
    _state.received = name
    if _state.deferred:
        log.warn(f"{name} received: stopping after this step")
        return
    raise _stopped(name)


def _stopped(name: str) -> Stopped:
    return Stopped(name, "the job was asked to stop", fix="run it again; finished stages are kept")
