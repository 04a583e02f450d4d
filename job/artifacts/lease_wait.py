"""How long a job waits for another one that holds the output's lease.

`kubectl delete job` returns at once, while the deleted pod still stores its checkpoint. The pod of
a new Job would meet that pod's lease, fail four times within two minutes, and fail the Job. So a
holder that was asked to stop is waited for. A pod waits for a running holder too, which may not
have been told yet that it was deleted. A second job started by mistake gets its error after that
wait, or at once outside a pod.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from job import log, signals
from job.artifacts.lease_folder import RENEWALS, LeaseFolder, LeaseHeld
from job.artifacts.lease_holder import LeaseHolder

POLL_SECONDS = 1.0
"""The longest pause between two looks at the lease."""
LOG_SECONDS = 30.0
"""How often the remaining time is logged."""


def _ignore() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class LeaseWait:
    """Whether to wait for a running holder (`runtime.lease_wait`), and what to do meanwhile."""

    seconds: float | None = None
    """None waits for the holder's grace period and one lease: for a holder that is stopping, and
    for any other if this job runs in a pod."""
    on_wait: Callable[[], object] = _ignore
    """Called once, if there is a wait."""

    def limit(self, holder: LeaseHolder, lease_seconds: float) -> float:
        """The longest wait for this holder, in seconds; 0 for none."""
        if self.seconds is not None:
            return self.seconds
        if holder.stopping or os.environ.get(signals.GRACE_VARIABLE):
            return max(holder.grace, signals.GRACE_SECONDS) + lease_seconds
        return 0.0


@dataclass
class HolderWatch:
    """One wait for the lease in `folder`; its deadline is set when a holder is first met."""

    folder: LeaseFolder
    wait: LeaseWait
    _since: float | None = field(default=None, init=False)
    _deadline: float = field(default=0.0, init=False)
    _logged: float = field(default=0.0, init=False)

    def until_dead(self, number: int, holder: LeaseHolder, machine: str) -> LeaseHolder | None:
        """The lease's last content, once its holder is dead; None if the lease changed hands.

        `machine` identifies this machine. Raises LeaseHeld if the holder outlives the wait, and
        StorageError if it is suspended on this machine.
        """
        while True:
            try:
                quiet = self._since is not None
                expired = self.folder.is_expired(number, holder, machine, quiet=quiet)
                return holder if expired else None
            except LeaseHeld as held:
                number_now, holder_now = self.folder.current()
                if number_now != number or holder_now is None:
                    return None
                holder = holder_now
                self._pause(held, holder)

    def _pause(self, held: LeaseHeld, holder: LeaseHolder) -> None:
        """Waits a moment before the next look at the lease. Raises LeaseHeld after the deadline."""
        now = time.monotonic()
        if self._since is None:
            limit = self.wait.limit(holder, self.folder.seconds)
            if limit <= 0:
                raise held
            self._since, self._deadline, self._logged = now, now + limit, now
            log.info(
                "another job holds the output; waiting for it to end"
                + (" (Ctrl-C gives up)" if log.is_terminal(sys.stderr) else ""),
                host=holder.host,
                since=holder.since,
                asked_to_stop=holder.stopping,
                at_most=log.duration(limit),
            )
            self.wait.on_wait()
        if now >= self._deadline:
            waited = log.duration(now - self._since)
            raise self.folder.held_error(holder, f"still holds it after {waited} of waiting")
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            log.info(
                "waiting for the job that holds the output",
                asked_to_stop=holder.stopping,
                left=log.duration(self._deadline - now),
            )
        time.sleep(min(POLL_SECONDS, self.folder.seconds / RENEWALS / 4))
