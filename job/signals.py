"""Handles SIGTERM and SIGINT, for a job on a cluster.

Outside training the signal interrupts the work with an exception; stored results stay intact,
because they are published atomically. During training the signal is deferred, and the trainer stops
after the step with a checkpoint. A second signal ends the process at once.

Python runs signal handlers only between bytecodes of the main thread, which may be deep in a
library or waiting for a transfer. So a thread watches for signals too: it abandons work that
does not end within PATIENCE_SECONDS. This loses no more than SIGKILL would, and it is reported.
"""

import ctypes
import math
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
"""How long the interrupted work may take to end by itself."""
REPORT_SECONDS = 5.0
"""How long each callback may take to record the error when the work is abandoned."""

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_RELAYED = signal.SIGUSR1
"""Sent by `relay`: another process of the job was asked to stop."""
_LOST = 0
"""Not a signal: tells the watching thread to raise a lost `Stopped` again."""
_RERAISE_SECONDS = 0.01
"""How long the thread waits before that, until the code that lost it has returned."""


@dataclass
class _State:
    received: str | None = None
    raised: bool = False
    lost: bool = False
    deferred: bool = False
    ended: bool = False
    abandoned: bool = False
    callbacks: list[Callable[[ReportedError], object]] = field(default_factory=list)


_state = _State()


def install(*callbacks: Callable[[ReportedError], object]) -> None:
    """Installs the signal handlers; called once per process, in its main thread.

    If the work is abandoned, `callbacks` run after those of `on_abandon`.
    """
    _state.callbacks[:0] = callbacks
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    sys.unraisablehook = _reraising(writer, sys.unraisablehook)
    os.register_at_fork(after_in_child=_restore_defaults)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    for number in (*_SIGNALS, _RELAYED):
        signal.signal(number, _handle)


def relay() -> None:
    """Stops this process because another process of the job was asked to stop.

    The launcher may also signal this process; the two do not count as two signals.
    """
    os.kill(os.getpid(), _RELAYED)


def received() -> str | None:
    """The name of the signal that asked the job to stop, if any."""
    return _state.received


def grace_seconds() -> float:
    """The time between SIGTERM and SIGKILL. Raises UsageError if it is no such number."""
    text = os.environ.get(GRACE_VARIABLE, "").strip()
    with suppress(ValueError):
        seconds = float(text) if text else GRACE_SECONDS
        if 0 <= seconds < math.inf:
            return seconds
    raise UsageError(
        GRACE_VARIABLE,
        "must be a number of seconds",
        value=text,
        fix="set it to 30, for example",
    )


def check() -> None:
    """Raises Stopped if a signal arrived while signals were deferred."""
    if _state.received is not None:
        raise _stopped(_state.received)


def cause_of(error: BaseException) -> BaseException:
    """The error that ended the work: `Stopped` if one was raised, else `error`.

    Libraries, and Python's imports, replace exceptions that pass through them by their own. If the
    work has been abandoned, this does not return: another error is being reported, and what it gave
    back, as the lease, may be why this one was raised.
    """
    while _state.abandoned:
        time.sleep(REPORT_SECONDS)
    if _state.raised and _state.received and not isinstance(error, Stopped):
        stopped = _stopped(_state.received)
        stopped.__cause__ = error
        return stopped
    return error


@contextmanager
def deferred() -> Iterator[None]:
    """Context in which signals raise nothing; `received` returns the signal."""
    before, _state.deferred = _state.deferred, True
    try:
        yield
    finally:
        _state.deferred = before


@contextmanager
def on_abandon(callback: Callable[[ReportedError], object]) -> Iterator[None]:
    """Context in which `callback` is called if the work is abandoned."""
    _state.callbacks.insert(0, callback)
    try:
        yield
    finally:
        _state.callbacks.remove(callback)


def mark_work_ended() -> None:
    """Records that the work has ended and only its report remains."""
    _state.ended = True


def exit_now(code: int) -> NoReturn:
    """Kills worker processes and exits, without waiting for threads or running exit handlers."""
    for child in multiprocessing.active_children():
        child.kill()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def abandon(error: ReportedError) -> NoReturn:
    """Abandons the work, from any thread: runs the callbacks with `error` and exits."""
    _state.abandoned = True
    for callback in _state.callbacks:
        # In a thread with a timeout: the store that the callback writes to may hang.
        thread = threading.Thread(target=callback, args=(error,), daemon=True)
        thread.start()
        thread.join(REPORT_SECONDS)
    exit_now(error.exit_code)


def die_with_parent(parent: int) -> None:
    """Makes this process die with `parent`, which started it; called first here. Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before this request
        os.kill(os.getpid(), signal.SIGKILL)


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
    """An unraisable hook that has a `Stopped` lost in a finalizer raised again.

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
        # The deadline is checked too: a `Stopped` lost again and again keeps the pipe readable.
        if select.select([reader], [], [], wait)[0] and time.monotonic() < due:
            number = os.read(reader, 1)[0]
            if number == _LOST:
                time.sleep(_RERAISE_SECONDS)
                relay()
            if number not in (*_SIGNALS, _RELAYED):
                continue
            if own and number != _RELAYED:
                os.write(2, f"{_name(number)} again: exiting immediately\n".encode())
                os._exit(STOPPED)
            own = own or number != _RELAYED
            if name:
                continue
            name, due, end = _name(number), time.monotonic() + PATIENCE_SECONDS, _end()
            when = "after this step" if _state.deferred else "now"
            log.warn(f"{name} received: stopping {when}")
        elif _state.ended:
            time.sleep(REPORT_SECONDS - PATIENCE_SECONDS)
            exit_now(STOPPED)
        elif not _state.deferred or time.monotonic() > end:
            if _state.deferred:
                log.warn("the grace period ends before the checkpoint is stored")
            abandon(_stopped(name))
        else:
            due = time.monotonic() + PATIENCE_SECONDS


def _end() -> float:
    """When to abandon a deferred stop: in time to report it before SIGKILL.

    Never if the grace period is not set: then storing the checkpoint may take any time.
    """
    if not os.environ.get(GRACE_VARIABLE):
        return float("inf")
    with suppress(UsageError):
        left = grace_seconds() - REPORT_SECONDS - PATIENCE_SECONDS
        return time.monotonic() + max(left, PATIENCE_SECONDS)
    return float("inf")


def _restore_defaults() -> None:
    """Restores the default handlers in a forked worker."""
    signal.set_wakeup_fd(-1)
    for number in (*_SIGNALS, _RELAYED):
        signal.signal(number, signal.SIG_DFL)


def _name(number: int) -> str:
    return signal.Signals(signal.SIGTERM if number == _RELAYED else number).name


def _stopped(name: str) -> Stopped:
    return Stopped(name, "the job was asked to stop", fix="run it again: completed stages are kept")
