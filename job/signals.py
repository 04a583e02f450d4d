"""SIGTERM and SIGINT, as a job on a cluster has to take them.

Outside training the signal ends the work where it is, by an exception; what is stored is whole
by the way it is stored. During training it is remembered, and the trainer stops after the step
with a checkpoint. A second signal ends the process at once.

Python runs handlers between two steps of the main thread only, which may be deep in a library or
waiting for a transfer. So a thread watches too: work that has not ended within PATIENCE_SECONDS
is left as it is. That loses nothing that a kill would not, and is told instead of silent.
"""

import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

from job import log
from job.errors import STOPPED, ReportedError, Stopped, UsageError

GRACE_VARIABLE = "JOB_GRACE_SECONDS"
"""The environment variable that tells how long after SIGTERM the job is left alive."""
GRACE_SECONDS = 30.0
"""Kubernetes' own, unless the pod says otherwise."""
PATIENCE_SECONDS = 1.5
"""How long the work may take to end by itself."""
LAST_WORDS_SECONDS = 5.0
"""How long it may then take to store why it ended."""

_PR_SET_PDEATHSIG = 1
_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_RELAYED = signal.SIGUSR1
"""By which this process is told that another one of the job was asked to stop."""
_LOST = 0
"""No signal's number: by which the watching thread is told to have the stop raised again."""
_AGAIN_SECONDS = 0.01
"""How long it waits before, for what lost the stop to be over."""


@dataclass
class _State:
    received: str | None = None
    raised: bool = False
    lost: bool = False
    deferred: bool = False
    taken: bool = False
    last_words: list[Callable[[ReportedError], object]] = field(default_factory=list)


_state = _State()


def install(*last_words: Callable[[ReportedError], object]) -> None:
    """From now on SIGTERM and SIGINT are handled; once for a process, in its main thread.

    `last_words` are called, before those of `telling`, where the work has to be left as it is.
    """
    _state.last_words[:0] = last_words
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    sys.unraisablehook = _raising_again(writer, sys.unraisablehook)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    for number in (*_NUMBERS, _RELAYED):
        signal.signal(number, _handle)


def relay() -> None:
    """Has this process stop as another one of the job was asked to.

    Its launcher may ask it too, before or after: that is no second signal.
    """
    os.kill(os.getpid(), _RELAYED)


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


def end_of(error: BaseException) -> BaseException:
    """Why the work ended where `error` ended it: the stop, if one was raised before.

    Libraries make errors of their own of what is raised within them, and so does Python: in an
    import, say.
    """
    if _state.raised and _state.received and not isinstance(error, Stopped):
        stopped = _stopped(_state.received)
        stopped.__cause__ = error
        return stopped
    return error


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal is only remembered, for `received` to tell."""
    before, _state.deferred = _state.deferred, True
    try:
        yield
    finally:
        _state.deferred = before


@contextmanager
def telling(last_words: Callable[[ReportedError], object]) -> Iterator[None]:
    """Within, `last_words` is called where the work has to be left as it is."""
    _state.last_words.insert(0, last_words)
    try:
        yield
    finally:
        _state.last_words.remove(last_words)


def taken() -> None:
    """Says that the work has ended and what is left is to tell of it."""
    _state.taken = True


def leave(code: int) -> NoReturn:
    """Ends the process now: no thread is waited for, and no worker process stays behind."""
    for child in multiprocessing.active_children():
        child.kill()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def give_up(error: ReportedError) -> NoReturn:
    """Leaves the work as it is, from any thread, and says why."""
    for tell in _state.last_words:
        # The store may be what the work is stuck on.
        thread = threading.Thread(target=tell, args=(error,), daemon=True)
        thread.start()
        thread.join(LAST_WORDS_SECONDS)
    leave(error.exit_code)


def die_with_parent() -> None:
    """For a child process to call first: it then ends where the job is killed.

    Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _handle(number: int, frame: FrameType | None) -> None:
    if _state.received is not None and (not _state.lost or _state.taken):
        return  # the watching thread has seen it too
    _state.received, _state.lost = _state.received or _name(number), False
    if not _state.deferred:
        _state.raised = True
        raise _stopped(_state.received)


def _raising_again(
    writer: int, otherwise: Callable[["sys.UnraisableHookArgs"], object]
) -> Callable[["sys.UnraisableHookArgs"], object]:
    """A hook that has a stop raised again where Python could not raise it: in a finalizer, say.

    It takes no lock and starts no thread: a finalizer runs wherever its object is let go.
    """

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, Stopped):
            _state.lost = True
            os.write(writer, bytes([_LOST]))
        else:
            otherwise(unraisable)

    return hook


def _watch(reader: int) -> None:
    """Reads the numbers of signals as they come, and sees to it that the first one has effect."""
    name, own, due, end = "", False, float("inf"), float("inf")
    while True:
        wait = max(due - time.monotonic(), 0) if name else None
        # Stops that are lost again and again come faster than they are read.
        if select.select([reader], [], [], wait)[0] and time.monotonic() < due:
            number = os.read(reader, 1)[0]
            if number == _LOST:
                time.sleep(_AGAIN_SECONDS)
                relay()
            if number not in (*_NUMBERS, _RELAYED):
                continue
            if own and number != _RELAYED:
                os.write(2, f"{_name(number)} again: leaving at once\n".encode())
                os._exit(STOPPED)
            own = own or number != _RELAYED
            if name:
                continue
            name, due, end = _name(number), time.monotonic() + PATIENCE_SECONDS, _end()
            log.warn(f"{name} received: stopping " + ("after this step" * _state.deferred or "now"))
        elif _state.taken:
            time.sleep(LAST_WORDS_SECONDS - PATIENCE_SECONDS)
            leave(STOPPED)
        elif not _state.deferred or time.monotonic() > end:
            if _state.deferred:
                log.warn("the grace period ends before the checkpoint is stored")
            give_up(_stopped(name))
        else:
            due = time.monotonic() + PATIENCE_SECONDS


def _end() -> float:
    """When a deferred stop is given up: in time to say so before the job is killed.

    Never where nobody said when that is: then there may be all the time that a store needs.
    """
    if not os.environ.get(GRACE_VARIABLE):
        return float("inf")
    with suppress(UsageError):
        left = grace_seconds() - LAST_WORDS_SECONDS - PATIENCE_SECONDS
        return time.monotonic() + max(left, PATIENCE_SECONDS)
    return float("inf")


def _forget() -> None:
    """In a forked worker: a signal to it is not one to the job."""
    signal.set_wakeup_fd(-1)
    for number in (*_NUMBERS, _RELAYED):
        signal.signal(number, signal.SIG_DFL)


def _name(number: int) -> str:
    return signal.Signals(signal.SIGTERM if number == _RELAYED else number).name


def _stopped(name: str) -> Stopped:
    return Stopped(name, "the job was asked to stop", fix="run it again; finished stages are kept")
