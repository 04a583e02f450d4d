"""How long a storage failure may last: one policy of retries for every protocol.

The libraries below make a single attempt each, so that attempts do not multiply.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from job import log
from job.errors import JobError, UsageError
from job.storage import failures

if TYPE_CHECKING:
    from tenacity import RetryCallState

T = TypeVar("T")

_thread = threading.local()

RETRIES = 7
"""Attempts after the first; with the waits below they ride out about a minute of outage."""
RETRIES_VARIABLE = "JOB_STORAGE_RETRIES"
"""The environment variable that overrides RETRIES."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
"""Seconds; the wait doubles from one to the other, plus up to FIRST_WAIT at random."""
RETRIED = ("passing", "expired")
"""Keys that expired are read anew: whoever issues them may have put fresh ones in their place."""
TOTAL_SECONDS = 180.0
"""No attempt starts later than this after the first."""


@contextmanager
def at_most(retries: int) -> Iterator[None]:
    """Within, on this thread, a failure ends after fewer retries than usual."""
    before, _thread.limit = getattr(_thread, "limit", None), retries
    try:
        yield
    finally:
        _thread.limit = before


class Abandoned(Exception):
    """The work that this was a part of has failed or was stopped; nobody waits for it."""


@contextmanager
def abandoned_with(stop: threading.Event | None) -> Iterator[None]:
    """Within, on this thread, no attempt starts and no wait goes on once `stop` is set."""
    before, _thread.stop = stop_event(), stop
    try:
        yield
    finally:
        _thread.stop = before


def stop_event() -> threading.Event | None:
    """What ends the work of this thread, for handing on to the threads that it starts."""
    return getattr(_thread, "stop", None)


def call(
    operation: failures.Operation,
    uri: str,
    function: Callable[[], T],
) -> T:
    """What `function` returns, trying again while its failures look as if they would pass.

    Raises InputError for what the user must mend (nothing there, access denied), StorageError
    for what did not pass in time or is out of space. Other errors are defects and pass through.
    """
    from tenacity import (  # 30 ms that commands which touch no storage need not pay
        Retrying,
        retry_if_exception,
        sleep_using_event,
        stop_after_attempt,
        stop_after_delay,
        wait_exponential_jitter,
    )

    stop = stop_event() or threading.Event()

    def attempt() -> T:
        if stop.is_set():
            raise Abandoned
        return function()

    limit = _retries()

    def warn(state: "RetryCallState") -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        log.warn(
            "storage attempt failed",
            operation=operation,
            uri=uri,
            attempt=f"{state.attempt_number}/{limit + 1}",
            wait=f"{state.next_action.sleep:.1f}s",
            cause=failures.cause(state.outcome.exception()),
        )

    retrying = Retrying(
        stop=stop_after_attempt(limit + 1) | stop_after_delay(TOTAL_SECONDS),
        wait=wait_exponential_jitter(FIRST_WAIT, LONGEST_WAIT, jitter=FIRST_WAIT),
        retry=retry_if_exception(lambda error: failures.diagnose(error) in RETRIED),
        before_sleep=warn,
        sleep=sleep_using_event(stop),
        reraise=True,
    )
    try:
        return retrying(attempt)
    except JobError:
        raise
    except Exception as error:
        attempts = retrying.statistics.get("attempt_number", 1)
        told = failures.explain(error, operation, uri, attempts)
        if told is None:
            raise
        raise told from error


def _retries() -> int:
    text = os.environ.get(RETRIES_VARIABLE, "").strip() or str(RETRIES)
    if not text.isdecimal():
        raise UsageError(
            RETRIES_VARIABLE, "must be a whole number", value=text, fix="set it to 0 or more"
        )
    limit = getattr(_thread, "limit", None)
    return int(text) if limit is None else min(limit, int(text))
