"""The work folder of a run, where its stages are made before they are stored.

It is named by what the output really is, so that the run that is killed and the one that goes on
find the same one, and held by a lock, so that no other run ever does. What is found there is
believed by digest alone. It is removed when the run has succeeded.
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
from types import TracebackType

from job import log, storage
from job.errors import InputError, JobError, StorageError
from job.local import lock as locks
from job.local.eviction import discard
from job.redaction import redact
from job.storage import failures
from job.storage.digests import fingerprint

HELD = ".held.json"
"""The file whose lock holds the folder; it says who has it, and for which output."""
LOOKS = 5
BEAT_SECONDS = 60.0
SILENT_SECONDS = 600.0
"""After which a holder on another machine, whose lock may not be seen here, counts as dead."""
EARLIER = re.compile(r"-[0-9a-f]{8}(-node\d+)?$")
"""How the folders of versions without a lock end."""


class WorkFolder:
    """The folder of one run below `root`; it is made and locked when it is first asked for."""

    def __init__(self, root: Path, label: str, uri: str, *, node: int = 0, field: str) -> None:
        """`label` begins its name; `field` of the spec says where `root` is.

        `node` tells the machines of one job apart, which may share a volume.
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
        """The folder, which from now on no other run takes.

        Raises InputError if it may not be written, StorageError if its disk is full.
        """
        name = f"{self._label}-{fingerprint(storage.identity(self._uri))[:16]}"
        name += f"-node{self._node}" if self._node else ""
        try:
            return self._taken(name)
        except OSError as error:
            if error.errno in locks.NO_LOCKS:  # nobody else can be kept out of any other
                return self._new(name)
            raise not_writable(self._field, self._root, error) from error

    def share(self, path: Path) -> None:
        """Takes the folder that another process of the job holds on this machine."""
        self.__dict__["path"] = path

    def close(self) -> None:
        """Lets another run have the folder, with all that is in it."""
        lock, self._lock = self._lock, None
        self.__dict__.pop("path", None)
        self._released.set()
        if lock is not None:
            with suppress(OSError):
                lock.write(None, output=redact(self._uri))
            lock.close()

    def remove(self) -> None:
        """Removes the folder; what cannot be removed is a warning."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _taken(self, name: str) -> Path:
        """The first folder of the name that no living process holds."""
        for number in count(1):
            folder = self._root.absolute() / (name if number == 1 else f"{name}.{number}")
            for _ in range(LOOKS):  # who looks at it only lets it go at once
                if (lock := _hold(folder)) is not None:
                    break
                time.sleep(locks.LOOK_SECONDS)
            if lock is None:
                by = locks.holder(folder / HELD)
                log.info("another process holds the work folder; this run takes another", by=by)
                continue
            lock.write(locks.Holder.me(), output=redact(self._uri))
            self._lock = lock
            self._released = threading.Event()
            threading.Thread(
                target=_beat, args=(lock, self._released), name="work folder", daemon=True
            ).start()
            return folder
        raise AssertionError("unreachable")

    def _new(self, name: str) -> Path:
        folder = self._root.absolute() / f"{name}.{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        log.info("the disk of the work folder knows no locks; this run takes a new one")
        return folder


def lives_elsewhere(folder: Path) -> bool:
    """Whether a process on another machine has the folder, as far as can be told from here.

    Not every shared volume shows the locks of one machine to another. A holder shows that it is
    alive by the time of a file, compared with that of a new one: no clock of a machine counts.
    """
    by = locks.holder(folder / HELD)
    if by is None or not by.elsewhere:
        return False
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        probe.touch()
        return probe.stat().st_mtime - (folder / HELD).stat().st_mtime < SILENT_SECONDS
    except OSError:
        return True
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def not_writable(field: str, folder: Path, error: OSError) -> JobError:
    """The error for a local folder that the spec names and that takes no files."""
    reason = error.strerror or str(error)
    if failures.diagnose(error) == "full":
        fix = (
            f"free space (python -m job clean), or set {field.removeprefix('$.')} to a larger disk"
        )
        return StorageError(field, f"no space is left: {reason}", value=str(folder), fix=fix)
    return InputError(
        field,
        f"may not be written by user {os.getuid()}: {reason}",
        value=str(error.filename or folder),
        fix="name a folder that this user may write to, or change its owner",
    )


def _hold(folder: Path) -> locks.Lock | None:
    """The folder's lock; None if another process has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = locks.take(folder / HELD)
        except FileNotFoundError:  # removed meanwhile, by the run that had it
            continue
        if lock is not None and lives_elsewhere(folder):
            lock.close()
            return None
        return lock


def _beat(lock: locks.Lock, released: threading.Event) -> None:
    while not released.wait(BEAT_SECONDS):
        with suppress(OSError):
            lock.touch()
