"""Files from elsewhere, kept by what they are and believed by their digests.

An entry appears whole: it is filled in a folder beside it, where an interrupted download goes on.
Of each file `.complete` records the SHA-256 and what the file system said of it right after those
bytes were read. An entry is looked at before each use: a file of which the file system says
anything else (size, inode, times of change) is read again and compared, and one with other bytes is
brought anew. What an unchanged inode cannot tell is a disk that decays beneath it.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from job import log, storage
from job.errors import InputError, StorageError
from job.local import lock as locks
from job.local.eviction import COMPLETE, FILL, PARTIAL, USE, USED, discard, make_room
from job.local.work_folder import not_writable
from job.storage import local
from job.storage.digests import sha256_file

FIELD = "$.runtime.cache_dir"
AT_ONCE = 4
"""Files that are brought or read together."""
_TOLD_FROM = 2**30  # bytes; fewer are read before anybody wonders
SETTLED_NS = 2 * 10**9
"""A file that changed so shortly before it was looked at may change again under the same time."""

_in_use: dict[Path, locks.Lock] = {}


class WrongBytes(StorageError):
    """A file arrived twice with other bytes than it has to have."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file of an entry, as it has to be."""

    path: str
    """Relative to the entry."""
    size: int
    sha256: str | None = None
    """None if its source does not tell it: then the first download counts."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A file whose bytes were read, and what the file system said of it then."""

    size: int
    sha256: str
    inode: int
    modified_ns: int
    changed_ns: int
    looked_ns: int

    @classmethod
    def of(cls, sha256: str, stat: os.stat_result, looked_ns: int) -> "Known":
        return cls(
            size=stat.st_size,
            sha256=sha256,
            inode=stat.st_ino,
            modified_ns=stat.st_mtime_ns,
            changed_ns=stat.st_ctime_ns,
            looked_ns=looked_ns,
        )

    def describes(self, stat: os.stat_result) -> bool:
        """Whether the file is the one that was read, and has not been changed since."""
        same = self == Known.of(self.sha256, stat, self.looked_ns)
        return same and self.changed_ns + SETTLED_NS < self.looked_ns


Fetch = Callable[[Wanted, Path], None]
"""Brings a file of an entry to a path, or raises what is to be told."""


def bring(
    cache: Path, kind: str, key: str, files: Sequence[Wanted], fetch: Fetch, *, of: str, limit: int
) -> Path:
    """The folder of an entry with all of `files`, each with the bytes that it has to have.

    This process keeps others from removing it until it ends. `of` is the URI that it comes from;
    `limit` is what all entries may take, in bytes, zero for no limit. Raises InputError if the
    cache may not be written and has not got them, StorageError if wrong bytes keep arriving.
    """
    entry = cache / kind / key
    try:
        _use(entry)
        known = _looked_at(entry, files)
        if known is None:
            known = _filled(cache, entry, files, fetch, of, limit)
        _note_use(entry, known)
    except OSError as error:
        raise not_writable(FIELD, cache, error) from error
    return entry


def _looked_at(entry: Path, files: Sequence[Wanted]) -> dict[str, Known] | None:
    """What is known of the entry's files if all are whole, else None."""
    known = _read(entry / COMPLETE)
    if known is None:
        return None
    found = _verified(entry, files, known)
    damaged = [file.path for file in files if file.path not in found]
    for path in damaged:
        log.warn("a cached file is not as it was stored; fetching it anew", file=entry / path)
    return None if damaged else found


def _filled(
    cache: Path, entry: Path, files: Sequence[Wanted], fetch: Fetch, of: str, limit: int
) -> dict[str, Known]:
    """Brings what is missing or damaged; one process at a time, the others find it done."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _filling(entry):
        whole = _read(entry / COMPLETE)
        folder = entry if whole is not None else entry.with_name(f"{PARTIAL}{entry.name}")
        journal = folder / COMPLETE
        known = whole if whole is not None else _read(journal) or {}
        found = _verified(folder, files, known)
        missing = [file for file in files if file.path not in found]
        if missing:
            _require_room(cache, missing, limit, entry)
            folder.mkdir(parents=True, exist_ok=True)
            log.info("download", uri=of, size=log.amount(sum(file.size for file in missing)))
        noting = threading.Lock()

        def work(file: Wanted) -> None:
            made = _brought(file, folder, fetch, known.get(file.path), of)
            with noting:  # at once: a process that is killed is to find it again
                found[file.path] = made
                _write(journal, {**known, **found})

        with (
            log.progress("download", len(missing), "files") as bar,
            ThreadPoolExecutor(AT_ONCE, "cache") as pool,
        ):
            for _ in pool.map(work, missing):
                bar.advance()
        _write(journal, {**known, **found})
        if folder != entry:
            if entry.exists():  # nothing says that it was ever whole
                discard(entry)
            folder.rename(entry)
    return found


def _brought(file: Wanted, folder: Path, fetch: Fetch, before: Known | None, of: str) -> Known:
    """A file with the bytes that it has to have; brought once more if others arrive.

    Wrong ones are not left there.
    """
    path = folder / file.path
    expected = file.sha256 or (before.sha256 if before else None)
    for again in (True, False):
        fetch(file, path)
        stat, now = path.stat(), time.time_ns()
        digest = sha256_file(path)
        if expected in (None, digest) and stat.st_size == file.size:
            return Known.of(digest, stat, now)
        path.unlink()
        if again:
            log.warn("other bytes arrived than were stored; fetching again", file=file.path)
    raise WrongBytes(
        storage.join(of, file.path),
        "other bytes arrive than are stored: the SHA-256 differs",
        fix="check the network and what is between here and there, then run again",
    )


def _verified(
    folder: Path, files: Sequence[Wanted], known: Mapping[str, Known]
) -> dict[str, Known]:
    """Those of the files that are there with the right bytes; read where that is not plain."""

    found: dict[str, Known] = {}
    doubtful: list[tuple[Wanted, str]] = []
    for file in files:
        before = known.get(file.path)
        digest = file.sha256 or (before.sha256 if before else None)
        try:
            stat = (folder / file.path).stat()
        except FileNotFoundError:
            continue
        if digest is None or stat.st_size != file.size:
            continue
        if before is not None and before.sha256 == digest and before.describes(stat):
            found[file.path] = before
        else:
            doubtful.append((file, digest))
    to_read = sum(file.size for file, _ in doubtful)
    if to_read > _TOLD_FROM:
        log.info("cached files are read to compare their digests", size=log.amount(to_read))

    def read(file: Wanted, digest: str) -> Known | None:
        path = folder / file.path
        stat, now = path.stat(), time.time_ns()
        return Known.of(digest, stat, now) if sha256_file(path) == digest else None

    with ThreadPoolExecutor(AT_ONCE, "digests") as pool:
        read_all = pool.map(lambda each: read(*each), doubtful)
        for (file, _), looked in zip(doubtful, read_all, strict=True):
            if looked is not None:
                found[file.path] = looked
    return found


def _require_room(cache: Path, missing: Sequence[Wanted], limit: int, entry: Path) -> None:
    needed = sum(file.size for file in missing)
    if limit:
        make_room(cache, limit, needed, keep=entry)
    free = shutil.disk_usage(_existing(cache)).free
    if free < needed:
        raise InputError(
            FIELD,
            f"the download needs {log.size(needed)} and {log.size(free)} are free",
            value=str(cache),
            fix="free space (python -m job clean), or name a folder on a larger disk",
        )


def _use(entry: Path) -> None:
    """Keeps others from removing the entry while this process lives, as far as locks reach."""
    if entry in _in_use:
        return
    with suppress(OSError):  # where nothing may be written nothing is removed either
        entry.parent.mkdir(parents=True, exist_ok=True)
        while (lock := locks.take(_beside(entry, USE), shared=True)) is None:
            time.sleep(locks.LOOK_SECONDS)  # it is being removed
        _in_use[entry] = lock


class _filling:  # noqa: N801 - a context manager
    """Within, no other process fills the entry; where there are no locks several may."""

    def __init__(self, entry: Path) -> None:
        self._path = _beside(entry, FILL)
        self._lock: locks.Lock | None = None

    def __enter__(self) -> None:
        try:
            self._lock = locks.take(self._path)
            if self._lock is None:
                by = locks.holder(self._path)
                log.info("another process downloads the same; waiting for it", by=by)
                self._lock = locks.wait(self._path)
            self._lock.write(locks.Holder.me())
        except OSError as error:
            if error.errno not in locks.NO_LOCKS:
                raise

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()


def _note_use(entry: Path, known: Mapping[str, Known]) -> None:
    """Stores when the entry was used last, and what was found out about its files."""
    with suppress(OSError):  # a cache that may not be written is one all the same
        (entry / USED).touch()
        if known != _read(entry / COMPLETE):
            _write(entry / COMPLETE, known)


def _beside(entry: Path, ending: str) -> Path:
    return entry.with_name(f".{entry.name}{ending}")


def _read(path: Path) -> dict[str, Known] | None:
    """The record of an entry; None without one that can be read."""
    try:
        found = json.loads(path.read_bytes())
        return {name: Known(**each) for name, each in found["files"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, known: Mapping[str, Known]) -> None:
    text = json.dumps({"files": {name: asdict(each) for name, each in known.items()}}, indent=1)
    local.write(path, f"{text}\n".encode())


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
