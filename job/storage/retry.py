"""One retry policy for every protocol.

The libraries underneath make a single attempt per call, so that attempts do not multiply.
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
"""Attempts after the first; with the waits below they bridge an outage of about a minute."""
RETRIES_VARIABLE = "JOB_STORAGE_RETRIES"
"""The environment variable that overrides RETRIES."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
"""Seconds; the wait doubles from one to the other, plus up to FIRST_WAIT at random."""
RETRIED = ("transient", "expired")
"""Kinds of failures that are retried; expired keys may have been renewed meanwhile."""
TOTAL_SECONDS = 180.0
"""No attempt starts later than this after the first."""


@contextmanager
def at_most(retries: int) -> Iterator[None]:
    """Context that limits the number of retries on this thread."""
    before, _thread.limit = getattr(_thread, "limit", None), retries
    try:
        yield
    finally:
        _thread.limit = before


class Abandoned(Exception):
    """The task that this call belongs to has failed or was stopped."""


@contextmanager
def abandoned_if_set(stop: threading.Event | None) -> Iterator[None]:
    """Context in which setting `stop` ends waits and prevents further attempts, on this thread."""
    before, _thread.stop = stop_event(), stop
    try:
        yield
    finally:
        _thread.stop = before


def stop_event() -> threading.Event | None:
    """The event passed to `abandoned_if_set`, to pass on to threads that this one starts."""
    return getattr(_thread, "stop", None)


def call(
    operation: failures.Operation,
    uri: str,
    function: Callable[[], T],
    explainer: failures.Explainer = failures.LOCAL,
) -> T:
    """Calls `function`, retrying transient failures as classified by `explainer`.

    Raises InputError for what the user must fix (not found, access denied), StorageError if
    failures persist or space runs out. Other errors are defects and pass through.
    """
    from tenacity import (  # 30 ms that commands without storage need not pay
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
        retry=retry_if_exception(lambda error: explainer.diagnose(error) in RETRIED),
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
        explained = explainer.explain(error, operation, uri, attempts)
        if explained is None:
            raise
        raise explained from error


def _retries() -> int:
    text = os.environ.get(RETRIES_VARIABLE, "").strip() or str(RETRIES)
    if not text.isdecimal():
        raise UsageError(
            RETRIES_VARIABLE, "must be a whole number", value=text, fix="set it to 0 or more"
        )
    limit = getattr(_thread, "limit", None)
    return int(text) if limit is None else min(limit, int(text))
