"""Lists cache entries with their last use, and removes entries that are not in use."""

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from job import log
from job.local import lock as locks

KINDS = MODELS, RESULTS, PREPARED = "models", "results", "prepared"
"""The folders of a cache: checkpoints by URI, files of finished runs, prepared rows."""
COMPLETE, USED, PREPARED_RECORD = ".complete", ".used", "made.json"
"""Files in an entry whose times tell when it was last used."""
USE, FILL = ".use", ".fill"
"""Suffixes of the lock files beside an entry: of its users, and of the process that fills it."""
PARTIAL, TRASH = ".partial-", ".trash-"
"""Prefixes of the names of incomplete entries, and of those being removed."""
LINKING_SECONDS = 3600.0
"""Linking prepared rows takes a moment; an incomplete entry older than this is abandoned."""

# Includes names used by earlier versions.
_INCOMPLETE = re.compile(rf"{re.escape(PARTIAL)}|{re.escape(TRASH)}|[0-9a-f]{{16,}}\.partial$")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """A folder of a cache."""

    kind: str
    """`models`, `results` or `prepared`."""
    path: Path
    bytes: int
    last_used: float
    """Seconds since the epoch, from file times."""
    complete: bool
    """False for an interrupted download or removal."""


def parse_size(limit: str | None) -> int:
    """Parses a size such as `200GB` to bytes; 0 for None, which means no limit."""
    return 0 if limit is None else int(float(limit[:-2]) * _UNITS[limit[-2:]])


def entries(cache: Path) -> Iterator[CacheEntry]:
    """All entries of the caches below `cache`. Links are not followed.

    Skips other content of these folders, such as a user's own model.
    """
    for kind in KINDS:
        for path in folders(cache / kind):
            complete = not _INCOMPLETE.match(path.name)
            stamps = [path / name for name in (USED, COMPLETE, PREPARED_RECORD)]
            if (
                complete
                and not (path / (PREPARED_RECORD if kind == PREPARED else COMPLETE)).is_file()
            ):
                continue
            with suppress(FileNotFoundError):  # removed by another process
                times = [stamp.stat().st_mtime for stamp in stamps if stamp.exists()]
                used = max(times, default=path.stat().st_mtime)
                yield CacheEntry(
                    kind=kind, path=path, bytes=size(path), last_used=used, complete=complete
                )


def size(folder: Path) -> int:
    """The bytes of the files below a folder; a file with several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                stat = Path(directory, name).lstat()
                seen[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(seen.values())


def may_be_linking(entry: CacheEntry) -> bool:
    """Whether a run may still be linking prepared rows into the entry."""
    return not entry.complete and time.time() - entry.last_used < LINKING_SECONDS


def remove(entry: CacheEntry) -> bool:
    """Removes an entry unless a process uses or fills it; returns whether it did.

    Raises OSError, also if the file system has no locks, so that use cannot be ruled out.
    """
    name = entry.path.name.removeprefix(PARTIAL)
    held: list[locks.Lock] = []
    try:
        if entry.kind == PREPARED:
            if may_be_linking(entry):
                return False
        elif not entry.path.name.startswith(TRASH):
            for ending in (USE, FILL):
                lock = locks.take(entry.path.with_name(f".{name}{ending}"))
                if lock is None:
                    return False
                held.append(lock)
        discard(entry.path)
        for lock in held:  # a process waiting for it notices and creates a new one
            lock.path.unlink(missing_ok=True)
        return True
    finally:
        for lock in held:
            lock.close()


def discard(folder: Path) -> None:
    """Removes a folder, after renaming it so that nobody uses it. Raises OSError."""
    trash = folder
    if not folder.name.startswith(TRASH):
        trash = folder.with_name(f"{TRASH}{secrets.token_hex(8)}")
        folder.rename(trash)
    shutil.rmtree(trash)


def make_room(cache: Path, limit: int, more: int = 0, *, keep: Path | None = None) -> None:
    """Removes complete entries until all of them and `more` bytes take at most `limit` bytes.

    The least recently used are removed first; entries in use and `keep` never.
    """
    oldest_first = sorted(entries(cache), key=lambda entry: entry.last_used)
    total = sum(entry.bytes for entry in oldest_first) + more
    for entry in oldest_first:
        if total <= limit:
            return
        if entry.path == keep or not entry.complete:
            continue
        try:
            removed = remove(entry)
        except OSError as error:
            log.debug("a cache entry could not be removed", entry=entry.path, reason=error)
            continue
        if removed:
            total -= entry.bytes
            log.info("removed from the cache", entry=entry.path, size=log.byte_count(entry.bytes))
    if total > limit:
        log.warn(
            "the cache is larger than runtime.cache_limit: the remaining entries are in use",
            size=log.byte_count(total),
            limit=log.byte_count(limit),
        )


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without links; none if it cannot be read."""
    try:
        return sorted(
            Path(each) for each in os.scandir(folder) if each.is_dir(follow_symlinks=False)
        )
    except OSError:
        return []
