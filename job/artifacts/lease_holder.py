"""Who holds a lease: what its file says, and whether the process behind it is alive."""

import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

Life = Literal["running", "stopped", "dead", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease, as its file says.

    Other versions of this project may write more keys, or fewer. What cannot be read is somebody's
    all the same: only that it changes, or not, tells more.
    """

    id: str = ""
    machine: str = ""
    """This boot of this machine, and the namespace that `process` is a number of."""
    process: int = 0
    process_started: str = ""
    host: str = "unknown"
    since: str = "unknown"
    renewed: int = 0
    """How often; only that it changes counts."""
    text: str = ""
    """The file as it was read."""

    def to_text(self) -> str:
        written = asdict(self)
        del written["text"]
        return json.dumps(written) + "\n"

    @classmethod
    def from_text(cls, text: str) -> "Holder":
        """Reads what this version knows of a lease; a holder without an id if that is nothing."""
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            return cls(text=text)
        known = {
            field.name: found[field.name]
            for field in fields(cls)
            if isinstance(found.get(field.name), type(field.default)) and field.name != "text"
        }
        return replace(cls(text=text), **known)


def myself() -> Holder:
    """This process, under an id of its own."""
    process = os.getpid()
    boot = _text("/proc/sys/kernel/random/boot_id") or secrets.token_hex(8)  # else no other's
    return Holder(
        id=secrets.token_hex(8),
        machine=f"{boot} {_namespace()}",
        process=process,
        process_started=_state_and_start(process)[1],
        host=socket.gethostname(),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def life(holder: Holder, machine: str) -> Life:
    """What became of a holder's process, as far as it can be seen from `machine`, which is here.

    `unknown` for another machine's, and where /proc hides the processes of other users
    (`hidepid=2`): what is not seen there is not dead.
    """
    if holder.machine != machine or holder.process <= 0:
        return "unknown"
    try:
        os.kill(holder.process, 0)
    except PermissionError:
        pass  # another user's, and there
    except (ProcessLookupError, OverflowError):
        return "dead"
    state, started = _state_and_start(holder.process)
    if not state or not holder.process_started:
        return "unknown"
    if state in "ZX" or started != holder.process_started:
        return "dead"
    return "stopped" if state in "Tt" else "running"


def _state_and_start(process: int) -> tuple[str, str]:
    """A process's state and when it started, in ticks since boot; empty where that is not seen."""
    fields_of = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return (fields_of[0], fields_of[19]) if len(fields_of) > 19 else ("", "")


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return secrets.token_hex(8)  # unknown, so no other's


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
