"""One retry policy for every protocol.

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
"""Attempts after the first; with the waits below they outlast about a minute of outage."""
RETRIES_VARIABLE = "JOB_STORAGE_RETRIES"
"""The environment variable that overrides RETRIES."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
"""Seconds; the wait doubles from one to the other, plus up to FIRST_WAIT at random."""
RETRIED = ("transient", "expired")
"""Expired keys are read again: their issuer may have replaced them."""
TOTAL_SECONDS = 180.0
"""After the first attempt; no later one starts."""


@contextmanager
def at_most(retries: int) -> Iterator[None]:
    """Lowers the number of retries, on this thread, within the block."""
    before, _thread.limit = getattr(_thread, "limit", None), retries
    try:
        yield
    finally:
        _thread.limit = before


class Abandoned(Exception):
    """The work that this call belongs to has failed or was stopped; nobody waits for the result."""


@contextmanager
def abandoned_with(stop: threading.Event | None) -> Iterator[None]:
    """Within the block, on this thread, setting `stop` ends every wait and prevents attempts."""
    before, _thread.stop = stop_event(), stop
    try:
        yield
    finally:
        _thread.stop = before


def stop_event() -> threading.Event | None:
    """The event that ends the work of this thread, to pass on to threads that it starts."""
    return getattr(_thread, "stop", None)


def call(
    operation: failures.Operation,
    uri: str,
    function: Callable[[], T],
    explainer: failures.Explainer = failures.LOCAL,
) -> T:
    """What `function` returns, retrying transient failures as `explainer` classifies them.

    Raises InputError for what the user must fix (nothing there, access denied), StorageError if
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
