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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from job import log
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
        self._hashing = threading.Lock()
        self._records: dict[str, FileRecord] | None = None

    def __reduce__(self) -> tuple[type["FileDigests"], tuple[Path | None]]:
        return FileDigests, (self._cache,)  # locks cannot be sent to worker processes

    def sha256(self, paths: Sequence[Path]) -> list[str]:
        """The files' digests, in order. Raises OSError if a file cannot be read.

        A thread that asks while another hashes waits for it, instead of reading the files again.
        """
        with self._hashing:
            known = self._known()
            stats = [path.stat() for path in paths]
            names = [str(path.absolute()) for path in paths]
            to_hash = [
                number
                for number, (name, stat) in enumerate(zip(names, stats, strict=True))
                if name not in known or not known[name].describes(stat)
            ]
            size = sum(stats[number].st_size for number in to_hash)
            if size > _LOGGED_FROM:
                log.info("hashing local files", size=log.byte_count(size))
            digests = {name: known[name].sha256 for name in names if name in known}
            hashed = _hash([paths[number] for number in to_hash])
            for number, record in zip(to_hash, hashed, strict=True):
                digests[names[number]] = record.sha256
                if record.size >= _REMEMBERED_FROM:
                    known[names[number]] = record
            if any(record.size >= _REMEMBERED_FROM for record in hashed):
                self._remember(known)
            return [digests[name] for name in names]

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


def _hash(paths: Sequence[Path]) -> list[FileRecord]:
    def record(path: Path) -> FileRecord:
        stat, now = path.stat(), time.time_ns()
        return FileRecord.of(sha256_file(path), stat, now)

    threads = max(4, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, "digests") as pool:
        return list(pool.map(record, paths))


def _read(path: Path) -> dict[str, FileRecord]:
    """The records in a file; none if it is missing or unreadable."""
    try:
        return {name: FileRecord(**each) for name, each in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
