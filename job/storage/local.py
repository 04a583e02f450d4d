"""Atomic writes, listings and locks on the local file system."""

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from job.storage.uri import INCOMPLETE_PREFIX, is_hidden

_ABANDONED_SECONDS = 60  # a younger file may belong to a writer that has yet to lock it

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Different disks, a file system without hard links, or a file that has too many."""

_POLL_SECONDS = 0.005  # between attempts at a lock that another process holds

_swept: set[Path] = set()


@contextmanager
def atomic_write(
    path: Path, placing: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces it if the block succeeds.

    The content is synced before the rename, so that not even a power failure leaves a partial
    file. If the block fails, the temporary file is removed. The context `placing` is entered only
    for the rename, once everything slow is done. Raises OSError.
    """
    directory = path.parent
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    unfinished = directory / f"{INCOMPLETE_PREFIX}{secrets.token_hex(8)}"
    try:
        with unfinished.open("xb") as file:
            with suppress(OSError):  # without locks on this file system, nothing is swept either
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield unfinished
            os.fsync(file.fileno())
            with placing():
                unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_directory(directory)


def link(
    source: Path,
    path: Path,
    placing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Makes `path` another name of the file `source`, in place of any other file.

    Returns False, and changes nothing, if they are on different disks or the file system has no
    hard links. Synced, and placed, as by `atomic_write`. Raises OSError.
    """
    directory = path.parent
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    unfinished = directory / f"{INCOMPLETE_PREFIX}{secrets.token_hex(8)}"
    with source.open("rb") as file:
        with suppress(OSError):  # against a sweep, as in `atomic_write`
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fsync(file.fileno())
        try:
            os.link(source.resolve(), unfinished)
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False
            raise
        try:
            with placing():
                unfinished.replace(path)
        finally:
            # Still there too if `path` was a name of the file already: renaming does nothing then.
            unfinished.unlink(missing_ok=True)
    _sync_directory(directory)
    return True


def write(path: Path, data: bytes) -> None:
    """Stores `data` at `path`, completely or not at all."""
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(data)


def write_new(path: Path, data: bytes) -> bool:
    """Stores `data` at `path` unless it exists; returns whether it did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f"{INCOMPLETE_PREFIX}{secrets.token_hex(8)}"
    try:
        unfinished.write_bytes(data)
        try:
            os.link(unfinished, path)
        except FileExistsError:
            return False
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def read(path: Path, limit: int | None) -> bytes:
    """The content, or at most its first `limit` bytes."""
    with path.open("rb") as file:
        return file.read() if limit is None else file.read(limit)


def exists(path: Path) -> bool:
    """Whether there is a file or a non-empty directory."""
    if path.is_dir():
        with os.scandir(path) as entries:
            return any(not is_hidden(entry.name) for entry in entries)
    return path.exists()


def size(path: Path) -> int:
    """The size of a file in bytes. Raises IsADirectoryError for a directory."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    return path.stat().st_size


def listing(root: Path) -> list[tuple[str, int]]:
    """Every file below `root` with its size, through links; empty if `root` does not exist.

    Skips names that begin with `..`, which Kubernetes uses inside mounted volumes.
    """
    if not root.exists():
        return []
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file, not a directory")
    files: list[tuple[str, int]] = []
    seen: set[str] = set()

    def stop(error: OSError) -> None:
        raise error

    for directory, below, names in os.walk(root, onerror=stop, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # a symlink to an ancestor would recurse forever
            below.clear()
            continue
        seen.add(real)
        below[:] = [each for each in below if not each.startswith("..")]
        for each in names:
            path = Path(directory, each)
            if not is_hidden(each) and not each.startswith("..") and path.exists():
                files.append((path.relative_to(root).as_posix(), path.stat().st_size))
    return files


def delete_tree(
    path: Path, removing: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Removes a directory and its content, or the link to one, if it exists.

    The context `removing` is entered for each file. Directories that another process writes to
    meanwhile are kept.
    """
    if path.is_symlink():
        with removing():
            path.unlink(missing_ok=True)
        return
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, not a directory")

    def stop(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for directory, below, names in os.walk(path, topdown=False, onerror=stop):
        links = [each for each in below if Path(directory, each).is_symlink()]
        for each in (*names, *links):
            with removing():
                Path(directory, each).unlink(missing_ok=True)
        try:
            Path(directory).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise


@contextmanager
def locked(path: Path, *, exclusive: bool, seconds: float) -> Iterator[bool]:
    """Context that holds a lock on the file, which is created if its directory exists.

    Non-exclusive locks are shared; a process that dies releases its lock. Yields False, and holds
    nothing, if the file system has no locks or no such directory. Raises TimeoutError if others
    hold the lock for longer than `seconds`.
    """
    descriptor = _lock(path, exclusive=exclusive, seconds=seconds)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # Explicitly: a process forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _lock(path: Path, *, exclusive: bool, seconds: float) -> int | None:
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    deadline = time.monotonic() + seconds
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None  # a later write reports the reason
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise TimeoutError(f"{path} is locked") from None
            time.sleep(_POLL_SECONDS)
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # it was removed, or another process holds it


def _sweep(directory: Path) -> None:
    """Removes unfinished files of killed writers: those that no living process has locked."""
    if directory in _swept:
        return
    _swept.add(directory)
    for leftover in directory.glob(f"{INCOMPLETE_PREFIX}*"):
        with suppress(OSError):  # locked, already gone, or not ours
            if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                with leftover.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    leftover.unlink()


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # some network file systems cannot, and need not
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
