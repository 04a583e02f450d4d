"""Downloaded files, cached and checked by their digests.

An entry is downloaded to a folder beside it, where an interrupted download resumes, and renamed
when it is complete. `.complete` records the SHA-256 of each file, and its size, inode and times
right after it was hashed. Before an entry is used, files whose size, inode or times changed are
hashed again, and downloaded again if the digest differs. Silent corruption by the disk goes
unnoticed.
"""

import json
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
from job.local.file_digests import FileRecord
from job.local.work_folder import not_writable
from job.storage import local
from job.storage.digests import sha256_file

FIELD = "$.runtime.cache_dir"
FILES_AT_ONCE = 4
"""Files downloaded or hashed in parallel."""
_LOGGED_FROM = 2**30  # bytes; hashing fewer is too fast to log
_in_use: dict[Path, locks.Lock] = {}


class DigestMismatch(StorageError):
    """A file was downloaded twice with the wrong SHA-256."""


@dataclass(frozen=True, kw_only=True)
class ExpectedFile:
    """A file that an entry must contain."""

    path: str
    """Relative to the entry."""
    size: int
    sha256: str | None = None
    """None if the source does not report it; then the digest of the first download is recorded."""


Download = Callable[[ExpectedFile, Path], None]
"""Downloads a file of an entry to a path, or raises a JobError."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    """An entry to complete."""

    cache: Path
    entry: Path
    files: Sequence[ExpectedFile]
    download: Download
    source: str
    limit: int


def ensure(
    cache: Path,
    kind: str,
    key: str,
    files: Sequence[ExpectedFile],
    download: Download,
    *,
    source: str,
    limit: int,
) -> Path:
    """The folder of an entry with all of `files` verified; downloads those that are missing.

    The entry is protected from removal until this process ends. `source` is the URI that it comes
    from; `limit` bounds the bytes of all entries, zero for no limit. Raises InputError if files are
    missing and the cache is not writable, StorageError if digests keep differing.
    """
    entry = cache / kind / key
    request = _Request(
        cache=cache, entry=entry, files=files, download=download, source=source, limit=limit
    )
    try:
        _use(entry)
        records = _check(entry, files)
        if records is None:
            records = _fill(request)
        _note_use(entry, records)
    except OSError as error:
        raise not_writable(FIELD, cache, error) from error
    return entry


def _check(entry: Path, files: Sequence[ExpectedFile]) -> dict[str, FileRecord] | None:
    """The records of the entry's files; None if one is missing or damaged."""
    recorded = _read(entry / COMPLETE)
    if recorded is None:
        return None
    verified = _verify(entry, files, recorded)
    damaged = [file.path for file in files if file.path not in verified]
    for path in damaged:
        log.warn("a cached file is missing or damaged; downloading it again", file=entry / path)
    return None if damaged else verified


def _fill(request: _Request) -> dict[str, FileRecord]:
    """Downloads what is missing or damaged, in one process at a time."""
    entry, files = request.entry, request.files
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _filling(entry):
        complete = _read(entry / COMPLETE)
        folder = entry if complete is not None else entry.with_name(f"{PARTIAL}{entry.name}")
        journal = folder / COMPLETE
        recorded = complete if complete is not None else _read(journal) or {}
        verified = _verify(folder, files, recorded)
        missing = [file for file in files if file.path not in verified]
        verb = "copy" if storage.is_local(request.source) else "download"
        if missing:
            _require_room(request, missing)
            folder.mkdir(parents=True, exist_ok=True)
            size = log.byte_count(sum(file.size for file in missing))
            log.info(verb, uri=request.source, size=size)
        journaling = threading.Lock()

        def download(file: ExpectedFile) -> None:
            record = _download(request, file, folder, recorded.get(file.path))
            with journaling:  # after each file, so that a killed process does not lose it
                verified[file.path] = record
                _write(journal, {**recorded, **verified})

        with (
            log.progress(verb, len(missing), "files") as bar,
            ThreadPoolExecutor(FILES_AT_ONCE, "cache") as pool,
        ):
            for _ in pool.map(download, missing):
                bar.advance()
        _write(journal, {**recorded, **verified})
        if folder != entry:
            if entry.exists():  # it has no record, so it may be incomplete
                discard(entry)
            folder.rename(entry)
    return verified


def _download(
    request: _Request, file: ExpectedFile, folder: Path, before: FileRecord | None
) -> FileRecord:
    """Downloads a file and checks its digest, with one more attempt if it differs.

    A file that does not match is removed.
    """
    path = folder / file.path
    expected = file.sha256 or (before.sha256 if before else None)
    for retry in (True, False):
        request.download(file, path)
        stat, now = path.stat(), time.time_ns()
        digest = sha256_file(path)
        if expected in (None, digest) and stat.st_size == file.size:
            return FileRecord.of(digest, stat, now)
        path.unlink()
        if retry:
            log.warn(
                "a downloaded file has the wrong SHA-256; downloading it again", file=file.path
            )
    raise DigestMismatch(
        storage.join(request.source, file.path),
        "the downloaded file has the wrong SHA-256, twice",
        fix="check the network and any proxy or mirror on the way, then run again",
    )


def _verify(
    folder: Path, files: Sequence[ExpectedFile], recorded: Mapping[str, FileRecord]
) -> dict[str, FileRecord]:
    """The records of the intact files; hashes files that changed since their record."""
    verified: dict[str, FileRecord] = {}
    to_hash: list[tuple[ExpectedFile, str]] = []
    for file in files:
        before = recorded.get(file.path)
        digest = file.sha256 or (before.sha256 if before else None)
        try:
            stat = (folder / file.path).stat()
        except FileNotFoundError:
            continue
        if digest is None or stat.st_size != file.size:
            continue
        if before is not None and before.sha256 == digest and before.describes(stat):
            verified[file.path] = before
        else:
            to_hash.append((file, digest))
    size = sum(file.size for file, _ in to_hash)
    if size > _LOGGED_FROM:
        log.info("hashing cached files to compare their digests", size=log.byte_count(size))

    def check(file: ExpectedFile, digest: str) -> FileRecord | None:
        path = folder / file.path
        stat, now = path.stat(), time.time_ns()
        return FileRecord.of(digest, stat, now) if sha256_file(path) == digest else None

    with ThreadPoolExecutor(FILES_AT_ONCE, "digests") as pool:
        records = pool.map(lambda each: check(*each), to_hash)
        for (file, _), record in zip(to_hash, records, strict=True):
            if record is not None:
                verified[file.path] = record
    return verified


def _require_room(request: _Request, missing: Sequence[ExpectedFile]) -> None:
    needed = sum(file.size for file in missing)
    if request.limit:
        make_room(request.cache, request.limit, needed, keep=request.entry)
    free = shutil.disk_usage(_existing(request.cache)).free
    if free < needed:
        raise InputError(
            FIELD,
            f"the download needs {log.size(needed)}, but only {log.size(free)} are free",
            value=str(request.cache),
            fix="free space (python -m job clean), or name a folder on a larger disk",
        )


def _use(entry: Path) -> None:
    """Protects the entry from removal while this process lives, if locks are supported."""
    if entry in _in_use:
        return
    with suppress(OSError):  # nothing is removed from a read-only cache
        entry.parent.mkdir(parents=True, exist_ok=True)
        while (lock := locks.take(_beside(entry, USE), shared=True)) is None:
            time.sleep(locks.POLL_SECONDS)  # it is being removed
        _in_use[entry] = lock


class _filling:  # noqa: N801 - a context manager
    """Keeps other processes from filling the entry, if the file system has locks."""

    def __init__(self, entry: Path) -> None:
        self._path = _beside(entry, FILL)
        self._lock: locks.Lock | None = None

    def __enter__(self) -> None:
        try:
            self._lock = locks.take(self._path)
            if self._lock is None:
                by = locks.holder(self._path)
                log.info("waiting for another process that downloads the same files", by=by)
                self._lock = locks.wait(self._path)
            self._lock.write(locks.LockHolder.this_process())
        except OSError as error:
            if error.errno not in locks.UNSUPPORTED:
                raise

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()


def _note_use(entry: Path, records: Mapping[str, FileRecord]) -> None:
    """Stores the time of use, and new records of the entry's files."""
    with suppress(OSError):  # a read-only cache can still be used
        (entry / USED).touch()
        if records != _read(entry / COMPLETE):
            _write(entry / COMPLETE, records)


def _beside(entry: Path, suffix: str) -> Path:
    return entry.with_name(f".{entry.name}{suffix}")


def _read(path: Path) -> dict[str, FileRecord] | None:
    """The records of an entry; None if they are missing or unreadable."""
    try:
        stored = json.loads(path.read_bytes())
        return {name: FileRecord(**each) for name, each in stored["files"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, records: Mapping[str, FileRecord]) -> None:
    text = json.dumps({"files": {name: asdict(each) for name, each in records.items()}}, indent=1)
    local.write(path, f"{text}\n".encode())


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
