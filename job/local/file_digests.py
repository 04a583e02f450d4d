"""SHA-256 of local files, computed in parallel and remembered between runs.

Hashing a checkpoint of 55 GiB takes longer than loading it. A digest is remembered with the file's
path, size, inode and times; a file of which any of these changed is hashed again. Silent corruption
by the disk goes unnoticed.
"""

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from job import log
from job.local import daemon_threads
from job.storage import local
from job.storage.digests import sha256_file

REMEMBERED = "digests.json"
"""The file in the cache folder; it may be removed at any time."""
SETTLED_NS = 2 * 10**9
"""A record this close to the file's last change is not trusted: a later change might have the same
timestamp."""
_REMEMBERED_FROM = 2**24  # bytes; smaller files are hashed in milliseconds
_LOGGED_FROM = 2**30  # bytes


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """The digest of a file, with the file's metadata when it was hashed."""

    size: int
    sha256: str
    inode: int
    modified_ns: int
    changed_ns: int
    looked_ns: int

    @classmethod
    def of(cls, sha256: str, stat: os.stat_result, looked_ns: int) -> "FileRecord":
        return cls(
            size=stat.st_size,
            sha256=sha256,
            inode=stat.st_ino,
            modified_ns=stat.st_mtime_ns,
            changed_ns=stat.st_ctime_ns,
            looked_ns=looked_ns,
        )

    def describes(self, stat: os.stat_result) -> bool:
        """Whether `stat` shows the same file as was hashed, unchanged since."""
        same = self == FileRecord.of(self.sha256, stat, self.looked_ns)
        return same and self.changed_ns + SETTLED_NS < self.looked_ns


class FileDigests:
    """Digests of local files. Without a cache folder, they are remembered by this object only."""

    def __init__(self, cache: Path | None = None) -> None:
        self._cache, self._path = cache, cache and cache / REMEMBERED
        self._lock = threading.Lock()
        """Of the three below, never held while a file is read."""
        self._records: dict[str, FileRecord] | None = None
        self._asked: set[str] = set()
        self._hashing: dict[str, threading.Lock] = {}

    def __reduce__(self) -> tuple[type["FileDigests"], tuple[Path | None]]:
        return FileDigests, (self._cache,)  # locks cannot be sent to worker processes

    def sha256(self, paths: Sequence[Path]) -> list[str]:
        """The files' digests, in order. Raises OSError if a file cannot be read.

        A thread that asks for a file that another hashes waits for it, instead of reading it again;
        for other files it does not wait.
        """
        names = [str(path.absolute()) for path in paths]
        with self._lock:
            known = self._known()
            stats = [path.stat() for path in paths]
            to_hash = {
                name: path
                for name, path, stat in zip(names, paths, stats, strict=True)
                if name not in known or not known[name].describes(stat)
            }
            digests = {name: known[name].sha256 for name in names if name not in to_hash}
            new = to_hash.keys() - self._asked
            self._asked |= new
        size = sum(stat.st_size for name, stat in zip(names, stats, strict=True) if name in new)
        if size > _LOGGED_FROM:
            log.info("hashing local files", size=log.byte_count(size))
        threads = max(4, len(os.sched_getaffinity(0)))
        paths = list(to_hash.values())
        try:
            records = daemon_threads.for_each(self._record, paths, threads=threads, name="digests")
        finally:
            with self._lock:
                self._asked -= new
        if any(record.size >= _REMEMBERED_FROM for record in records):
            with self._lock:
                self._remember(self._known())
        digests |= {n: record.sha256 for n, record in zip(to_hash, records, strict=True)}
        return [digests[name] for name in names]

    def _record(self, path: Path) -> FileRecord:
        """Hashes a file, or waits for the thread that does; a small one is hashed by both."""
        stat, now = path.stat(), time.time_ns()
        if stat.st_size < _REMEMBERED_FROM:
            return FileRecord.of(sha256_file(path), stat, now)
        name = str(path.absolute())
        with self._lock:
            hashing = self._hashing.setdefault(name, threading.Lock())
        with hashing:
            stat, now = path.stat(), time.time_ns()
            with self._lock:
                known = self._known().get(name)
            if known is not None and known.describes(stat):
                return known
            record = FileRecord.of(sha256_file(path), stat, now)
            with self._lock:
                self._known()[name] = record
            return record

    def _known(self) -> dict[str, FileRecord]:
        if self._records is None:
            self._records = {} if self._path is None else _read(self._path)
        return self._records

    def _remember(self, records: Mapping[str, FileRecord]) -> None:
        """Stores the records, with those that other processes stored meanwhile."""
        if self._path is None:
            return
        stored = {**_read(self._path), **records}
        text = json.dumps({n: asdict(r) for n, r in stored.items() if Path(n).exists()}, indent=1)
        with suppress(OSError):  # a read-only cache, or a full disk: hashed again next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            local.write(self._path, f"{text}\n".encode())


def _read(path: Path) -> dict[str, FileRecord]:
    """The records in a file; none if it is missing or unreadable."""
    try:
        return {name: FileRecord(**each) for name, each in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
