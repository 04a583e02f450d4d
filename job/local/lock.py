"""File locks (`flock`), which the kernel releases when their process dies.

The lock file records which process holds the lock.
"""

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.local.process_identity import boot_id, utc_now

POLL_SECONDS = 0.2
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems without locks."""


@dataclass(frozen=True, kw_only=True)
class LockHolder:
    """The process that holds a lock, as recorded in the lock file."""

    host: str
    boot: str
    """Boot id of its kernel. Locks within one kernel are always visible."""
    process: int
    since: str

    def __str__(self) -> str:
        return f"host {self.host}, process {self.process}, since {self.since}"

    @classmethod
    def this_process(cls) -> "LockHolder":
        return cls(
            host=socket.gethostname(),
            boot=boot_id(),
            process=os.getpid(),
            since=utc_now(),
        )

    @property
    def on_another_machine(self) -> bool:
        """Whether the process runs on another machine, whose locks may be invisible here."""
        return self.boot != boot_id() and self.host != socket.gethostname()


class Lock:
    """A lock, held until `close` or the end of this process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        _held.add(self)

    def close(self) -> None:
        """Releases the lock; safe to call twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def write(self, holder: LockHolder | None, **more: object) -> None:
        """Records the holder and `more` in the lock file. Raises OSError."""
        assert self._descriptor is not None
        content = {**more, **(asdict(holder) if holder else {})}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(content).encode(), 0)

    def touch(self) -> None:
        """Updates the file's time as a heartbeat for machines that cannot see the lock."""
        if self._descriptor is not None:
            os.utime(self.path)

    def _forget(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def take(path: Path, *, shared: bool = False) -> Lock | None:
    """Locks the file at `path`, created if missing; None if another process holds the lock.

    Raises OSError if the folder is missing, the file cannot be opened, or the file system has no
    locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        descriptor = _open(path, shared=shared)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return Lock(path, descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was replaced between opening and locking


def wait(path: Path) -> Lock:
    """Locks the file at `path` exclusively, once it is free."""
    while (lock := take(path)) is None:
        time.sleep(POLL_SECONDS)
    return lock


def read(path: Path) -> Mapping[str, Any]:
    """The content of the lock file; empty if it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def holder(path: Path) -> LockHolder | None:
    """The process that holds the lock, or held it last."""
    try:
        content = read(path)
        return LockHolder(**{key: content[key] for key in ("host", "boot", "process", "since")})
    except KeyError:
        return None


def _open(path: Path, *, shared: bool) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        # A lock file in a read-only folder can still be shared.
        if not shared or not path.is_file():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()


# A forked child must not keep the parent's locks when the parent dies.
os.register_at_fork(after_in_child=_forget_all)
