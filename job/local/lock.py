"""File locks that end with their holder, and who that is.

`flock` on a file: the kernel releases it when the process dies, however it dies.
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

LOOK_SECONDS = 0.2
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems say that know no locks."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock, as it wrote into the file."""

    host: str
    boot: str
    """The kernel that the process ran on: a lock of the same one is always seen."""
    process: int
    since: str

    def __str__(self) -> str:
        return f"host {self.host}, process {self.process}, since {self.since}"

    @classmethod
    def me(cls) -> "Holder":
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            process=os.getpid(),
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    @property
    def elsewhere(self) -> bool:
        """Whether it ran on another machine, whose locks this one may not see."""
        return self.boot != _boot() and self.host != socket.gethostname()


class Lock:
    """A lock that is held until `close`, or until this process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        _held.add(self)

    def close(self) -> None:
        """Releases the lock; once is enough, twice does no harm."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def write(self, holder: Holder | None, **more: object) -> None:
        """Leaves in the file who holds it, for others to read. OSError as the system raises it."""
        assert self._descriptor is not None
        said = {**more, **(asdict(holder) if holder else {})}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(said).encode(), 0)

    def touch(self) -> None:
        """Shows those who cannot see the lock that its holder is alive."""
        if self._descriptor is not None:
            os.utime(self.path)

    def _forget(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def take(path: Path, *, shared: bool = False) -> Lock | None:
    """The lock of the file at `path`, which is made if need be; None if another holds it.

    Many may share it, or one have it alone. OSError as the system raises it: the folder is not
    there, the file may not be opened, or the file system knows no locks.
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
        os.close(descriptor)  # its folder was removed between opening and locking


def wait(path: Path) -> Lock:
    """The lock of the file at `path`, for this process alone, as soon as it is free."""
    while (lock := take(path)) is None:
        time.sleep(LOOK_SECONDS)
    return lock


def said(path: Path) -> Mapping[str, Any]:
    """What the holder left in the file; empty if that cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def holder(path: Path) -> Holder | None:
    """Who holds the lock, or held it and died."""
    try:
        found = said(path)
        return Holder(**{key: found[key] for key in ("host", "boot", "process", "since")})
    except KeyError:
        return None


def _open(path: Path, *, shared: bool) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        # Where nothing may be written, a lock that is there can still be shared.
        if not shared or not path.is_file():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()


# A child that outlives its parent for a moment must not keep what the parent held.
os.register_at_fork(after_in_child=_forget_all)
