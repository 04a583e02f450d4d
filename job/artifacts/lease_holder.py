"""The holder of a lease: the content of the lease file, and whether its process is alive."""

import json
import math
import os
import secrets
import socket
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from job import signals
from job.local.process_identity import boot_id, utc_now

ProcessState = Literal["running", "stopped", "dead", "unknown"]


@dataclass(frozen=True, kw_only=True)
class LeaseHolder:
    """The holder of a lease, as recorded in the lease file.

    Other versions of this project may write more or fewer keys. Even the file of an unreadable
    holder shows, by changing, that the holder is alive.
    """

    id: str = ""
    machine: str = ""
    """The boot of its machine, and the PID namespace of `process`."""
    process: int = 0
    process_started: str = ""
    host: str = "unknown"
    since: str = "unknown"
    renewed: int = 0
    """Number of renewals; only a change matters."""
    grace: float = 0.0
    """Seconds that it has to end, from the signal to stop until it is killed."""
    stopping: bool = False
    """Whether it was asked to stop."""
    text: str = ""
    """The file as it was read."""

    def __str__(self) -> str:
        stopping = ", asked to stop" if self.stopping else ""
        return f"host {self.host}, process {self.process}, since {self.since}{stopping}"

    def to_text(self) -> str:
        written = asdict(self)
        del written["text"]
        return json.dumps(written) + "\n"

    @classmethod
    def from_text(cls, text: str) -> "LeaseHolder":
        """Reads the known keys; unreadable text gives a holder without an id."""
        try:
            written = json.loads(text)
        except ValueError:
            written = None
        if not isinstance(written, dict):
            return cls(text=text)
        known = {
            field.name: written[field.name]
            for field in fields(cls)
            if isinstance(written.get(field.name), type(field.default)) and field.name != "text"
        }
        return replace(cls(text=text), **{**known, "grace": _seconds(written.get("grace"))})


def _seconds(written: object) -> float:
    """A number of seconds; 0 for anything else, which must not make a job wait for ever."""
    if isinstance(written, int | float) and 0 <= written < math.inf:
        return float(written)
    return 0.0


def this_process() -> LeaseHolder:
    """This process, under a new id. Raises UsageError if its grace period is not a number."""
    process = os.getpid()
    boot = boot_id() or secrets.token_hex(8)  # unknown: matches no other process
    return LeaseHolder(
        id=secrets.token_hex(8),
        machine=f"{boot} {_pid_namespace()}",
        process=process,
        process_started=_state_and_start(process)[1],
        host=socket.gethostname(),
        since=utc_now(),
        grace=float(signals.grace_seconds()),
    )


def process_state(holder: LeaseHolder, machine: str) -> ProcessState:
    """The state of the holder's process, if it runs on `machine`, this machine.

    `unknown` if it runs on another machine, or if /proc hides it (`hidepid=2`): a hidden process
    may be alive.
    """
    if holder.machine != machine or holder.process <= 0:
        return "unknown"
    try:
        os.kill(holder.process, 0)
    except PermissionError:
        pass  # exists, as another user's
    except (ProcessLookupError, OverflowError):
        return "dead"
    state, started = _state_and_start(holder.process)
    if not state or not holder.process_started:
        return "unknown"
    if state in "ZX" or started != holder.process_started:
        return "dead"
    return "stopped" if state in "Tt" else "running"


def _state_and_start(process: int) -> tuple[str, str]:
    """A process's state and its start time in ticks since boot; empty if invisible."""
    stat = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return (stat[0], stat[19]) if len(stat) > 19 else ("", "")


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return secrets.token_hex(8)  # unknown: matches no other process


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
