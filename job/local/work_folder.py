"""The work folder of a run, where stages are built before they are stored.

Its name derives from the identity of the output, so that a killed run and the run that resumes it
find the same folder; a lock keeps other runs out. Files in it are used only if their digests match.
It is removed when the run has succeeded.
"""

import os
import re
import secrets
import threading
import time
from contextlib import suppress
from functools import cached_property
from itertools import count
from pathlib import Path

from job import log, storage
from job.errors import InputError, JobError, StorageError
from job.local import lock as locks
from job.local.eviction import discard
from job.redaction import redact
from job.storage import failures
from job.storage.digests import fingerprint

LOCK_FILE = ".held.json"
"""The lock file of the folder, which records its holder and output."""
LOCK_ATTEMPTS = 5
HEARTBEAT_SECONDS = 60.0
SILENT_SECONDS = 600.0
"""A holder on another machine, whose lock may be invisible, counts as dead without a heartbeat for
this long."""
LEGACY_NAME = re.compile(r"-[0-9a-f]{8}(-node\d+)?$")
"""Matches folder names of earlier versions, which had no lock."""


class WorkFolder:
    """The folder of one run below `root`, created and locked on first use."""

    def __init__(self, root: Path, label: str, uri: str, *, node: int = 0, field: str) -> None:
        """`label` is the prefix of its name; `field` is the spec's key that sets `root`.

        `node` separates the machines of one job, which may share a volume.
        """
        self._root, self._label, self._uri = root, label, uri
        self._node, self._field = node, field
        self._lock: locks.Lock | None = None
        self._released = threading.Event()

    def __truediv__(self, part: str) -> Path:
        return self.path / part

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def path(self) -> Path:
        """The folder, locked against other runs.

        Raises InputError if it is not writable, StorageError if its disk is full.
        """
        name = f"{self._label}-{fingerprint(storage.identity(self._uri))[:16]}"
        name += f"-node{self._node}" if self._node else ""
        try:
            return self._locked(name)
        except OSError as error:
            if error.errno in locks.UNSUPPORTED:  # only a new folder is safe from other runs
                return self._new(name)
            raise not_writable(self._field, self._root, error) from error

    def share(self, path: Path) -> None:
        """Uses the folder that another process of the job has locked on this machine."""
        self.__dict__["path"] = path

    def close(self) -> None:
        """Releases the lock but keeps the folder, for the run that resumes."""
        lock, self._lock = self._lock, None
        self.__dict__.pop("path", None)
        self._released.set()
        if lock is not None:
            with suppress(OSError):
                lock.write(None, output=redact(self._uri))
            lock.close()

    def remove(self) -> None:
        """Removes the folder; a failure is a warning."""
        folder = self.__dict__.get("path")
        if folder is not None:
            try:
                discard(folder)
            except OSError as error:
                log.warn(
                    "the work folder could not be removed",
                    folder=folder,
                    reason=error,
                    fix="python -m job clean --remove",
                )
        self.close()

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _locked(self, name: str) -> Path:
        """The first folder of that name that no living process holds, locked."""
        for number in count(1):
            folder = self._root.absolute() / (name if number == 1 else f"{name}.{number}")
            for _ in range(LOCK_ATTEMPTS):  # `job clean` may hold it briefly
                if (lock := _hold(folder)) is not None:
                    break
                time.sleep(locks.POLL_SECONDS)
            if lock is None:
                by = locks.holder(folder / LOCK_FILE)
                log.info("another process holds the work folder; this run uses another", by=by)
                continue
            lock.write(locks.LockHolder.this_process(), output=redact(self._uri))
            self._lock = lock
            self._released = threading.Event()
            threading.Thread(
                target=_keep_alive, args=(lock, self._released), name="work folder", daemon=True
            ).start()
            return folder
        raise AssertionError("unreachable")

    def _new(self, name: str) -> Path:
        folder = self._root.absolute() / f"{name}.{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        log.info("the disk of the work folder has no file locks; this run uses a new folder")
        return folder


def held_on_another_machine(folder: Path) -> bool:
    """Whether a live process on another machine seems to hold the folder.

    Not every shared volume shows one machine's locks to another. A holder keeps updating the time
    of its lock file, which is compared with that of a new file, so the machines' clocks need not
    agree.
    """
    holder = locks.holder(folder / LOCK_FILE)
    if holder is None or not holder.on_another_machine:
        return False
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        probe.touch()
        return probe.stat().st_mtime - (folder / LOCK_FILE).stat().st_mtime < SILENT_SECONDS
    except OSError:
        return True
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def not_writable(field: str, folder: Path, error: OSError) -> JobError:
    """The error for a local folder, set by the spec key `field`, that cannot be written."""
    reason = error.strerror or str(error)
    if failures.LOCAL.diagnose(error) == "full":
        fix = (
            f"free space (python -m job clean), or set {field.removeprefix('$.')} to a larger disk"
        )
        return StorageError(field, f"no space left: {reason}", value=str(folder), fix=fix)
    return InputError(
        field,
        f"is not writable for user {os.getuid()}: {reason}",
        value=str(error.filename or folder),
        fix="name a folder that this user can write, or change its owner",
    )


def _hold(folder: Path) -> locks.Lock | None:
    """Locks the folder, created if missing; None if another process holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = locks.take(folder / LOCK_FILE)
        except FileNotFoundError:  # removed meanwhile by the run that held it
            continue
        if lock is not None and held_on_another_machine(folder):
            lock.close()
            return None
        return lock


def _keep_alive(lock: locks.Lock, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            lock.touch()
