"""SIGTERM and SIGINT, as a job on a cluster must handle them.

Outside training the signal interrupts the work with an exception; what is stored stays intact,
because it is published atomically. During training the signal is deferred, and the trainer stops
after the step with a checkpoint. A second signal ends the process at once.

Python runs signal handlers only between bytecodes of the main thread, which may be deep in a
library or waiting for a transfer. So a thread watches too: work that does not end within
PATIENCE_SECONDS is abandoned. That loses nothing that a kill would not, and it is reported.
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
"""The environment variable with the time between SIGTERM and SIGKILL."""
GRACE_SECONDS = 30.0
"""Kubernetes' default."""
PATIENCE_SECONDS = 1.5
"""How long the work may take to end by itself."""
REPORT_SECONDS = 5.0
"""How long each callback may then take to store why it ended."""

_PR_SET_PDEATHSIG = 1
_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_RELAYED = signal.SIGUSR1
"""Tells this process that another process of the job was asked to stop."""
_LOST = 0
"""Not a signal: tells the watching thread that the stop was lost and must be raised again."""
_RERAISE_SECONDS = 0.01
"""How long it waits for what lost the stop to be over."""


@dataclass
class _State:
    received: str | None = None
    raised: bool = False
    lost: bool = False
    deferred: bool = False
    ended: bool = False
    callbacks: list[Callable[[ReportedError], object]] = field(default_factory=list)


_state = _State()


def install(*callbacks: Callable[[ReportedError], object]) -> None:
    """Handles SIGTERM and SIGINT from now on; called once per process, in its main thread.

    The callbacks run after those of `on_give_up` if the work is abandoned.
    """
    _state.callbacks[:0] = callbacks
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    sys.unraisablehook = _reraising(writer, sys.unraisablehook)
    os.register_at_fork(after_in_child=_restore_defaults)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    for number in (*_NUMBERS, _RELAYED):
        signal.signal(number, _handle)


def relay() -> None:
    """Stops this process because another process of the job was asked to stop.

    Its launcher may ask it too, before or after; that does not count as a second signal.
    """
    os.kill(os.getpid(), _RELAYED)


def received() -> str | None:
    """The name of the signal that asked the job to stop, if any."""
    return _state.received


def grace_seconds() -> float:
    """The time between SIGTERM and SIGKILL. Raises UsageError if it is not a number."""
    text = os.environ.get(GRACE_VARIABLE, "").strip()
    try:
        return float(text) if text else GRACE_SECONDS
    except ValueError:
        raise UsageError(
            GRACE_VARIABLE,
            "must be a number of seconds",
            value=text,
            fix="set it to 30, for example",
        ) from None


def check() -> None:
    """Raises Stopped if a signal came while signals were deferred."""
    if _state.received is not None:
        raise _stopped(_state.received)


def end_of(error: BaseException) -> BaseException:
    """Why the work ended with `error`: the stop, if one was raised before.

    Libraries, and Python's imports, turn exceptions raised within them into their own.
    """
    if _state.raised and _state.received and not isinstance(error, Stopped):
        stopped = _stopped(_state.received)
        stopped.__cause__ = error
        return stopped
    return error


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal raises nothing; `received` returns it."""
    before, _state.deferred = _state.deferred, True
    try:
        yield
    finally:
        _state.deferred = before


@contextmanager
def on_give_up(callback: Callable[[ReportedError], object]) -> Iterator[None]:
    """Within, `callback` is called if the work is abandoned."""
    _state.callbacks.insert(0, callback)
    try:
        yield
    finally:
        _state.callbacks.remove(callback)


def work_ended() -> None:
    """Notes that the work has ended; only its report is left."""
    _state.ended = True


def leave(code: int) -> NoReturn:
    """Ends the process now, without waiting for threads; kills its worker processes."""
    for child in multiprocessing.active_children():
        child.kill()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def give_up(error: ReportedError) -> NoReturn:
    """Abandons the work, from any thread, and reports why."""
    for callback in _state.callbacks:
        # In a thread: the work may be stuck on the very store that the callback writes to.
        thread = threading.Thread(target=callback, args=(error,), daemon=True)
        thread.start()
        thread.join(REPORT_SECONDS)
    leave(error.exit_code)


def die_with_parent() -> None:
    """Called first in a child process, so that it dies if the job is killed. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _handle(number: int, frame: FrameType | None) -> None:
    if _state.received is not None and (not _state.lost or _state.ended):
        return  # the watching thread handles further signals
    _state.received, _state.lost = _state.received or _name(number), False
    if not _state.deferred:
        _state.raised = True
        raise _stopped(_state.received)


def _reraising(
    writer: int, default: Callable[["sys.UnraisableHookArgs"], object]
) -> Callable[["sys.UnraisableHookArgs"], object]:
    """A hook that raises a stop again if Python could not, as in a finalizer.

    It takes no lock and starts no thread, because finalizers run anywhere.
    """

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, Stopped):
            _state.lost = True
            os.write(writer, bytes([_LOST]))
        else:
            default(unraisable)

    return hook


def _watch(reader: int) -> None:
    """Reads signal numbers as they arrive, and makes sure that the first one takes effect."""
    name, own, due, end = "", False, float("inf"), float("inf")
    while True:
        wait = max(due - time.monotonic(), 0) if name else None
        # A stop that is lost again and again arrives faster than it is read.
        if select.select([reader], [], [], wait)[0] and time.monotonic() < due:
            number = os.read(reader, 1)[0]
            if number == _LOST:
                time.sleep(_RERAISE_SECONDS)
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
        elif _state.ended:
            time.sleep(REPORT_SECONDS - PATIENCE_SECONDS)
            leave(STOPPED)
        elif not _state.deferred or time.monotonic() > end:
            if _state.deferred:
                log.warn("the grace period ends before the checkpoint is stored")
            give_up(_stopped(name))
        else:
            due = time.monotonic() + PATIENCE_SECONDS


def _end() -> float:
    """When a deferred stop is abandoned: in time to report it before the job is killed.

    Never if the grace period is not set: then a store may take all the time it needs.
    """
    if not os.environ.get(GRACE_VARIABLE):
        return float("inf")
    with suppress(UsageError):
        left = grace_seconds() - REPORT_SECONDS - PATIENCE_SECONDS
        return time.monotonic() + max(left, PATIENCE_SECONDS)
    return float("inf")


def _restore_defaults() -> None:
    """In a forked worker, whose signals are not the job's."""
    signal.set_wakeup_fd(-1)
    for number in (*_NUMBERS, _RELAYED):
        signal.signal(number, signal.SIG_DFL)


def _name(number: int) -> str:
    return signal.Signals(signal.SIGTERM if number == _RELAYED else number).name


def _stopped(name: str) -> Stopped:
    return Stopped(name, "the job was asked to stop", fix="run it again: completed stages are kept")
