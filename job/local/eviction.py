"""What caches hold, how long ago it was used, and how it is removed: never while it is in use."""

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
"""The folders of a cache: checkpoints by URI, parts of finished runs, prepared rows."""
COMPLETE, USED, MADE = ".complete", ".used", "made.json"
"""Files in an entry whose times say when it was last used."""
USE, FILL = ".use", ".fill"
"""Endings of the locks beside an entry: of those who use it, and of the one who fills it."""
PARTIAL, TRASH = ".partial-", ".trash-"
"""How the names begin of entries that are not whole yet, and of those that are being removed."""
LINKING_SECONDS = 3600.0
"""Prepared rows are linked in a moment; what is half linked after so long is left behind."""

# Also as earlier versions named them.
_HALF = re.compile(rf"{re.escape(PARTIAL)}|{re.escape(TRASH)}|[0-9a-f]{{16,}}\.partial$")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A folder of a cache."""

    kind: str
    """`models`, `results` or `prepared`."""
    path: Path
    bytes: int
    used: float
    """In seconds since 1970, by the clock of the disk."""
    whole: bool
    """Otherwise it is a download that was interrupted, or a removal."""


def in_bytes(limit: str | None) -> int:
    """A size as the spec writes it (`200GB`) in bytes; zero for None, no limit."""
    return 0 if limit is None else int(float(limit[:-2]) * _UNITS[limit[-2:]])


def entries(cache: Path) -> Iterator[Entry]:
    """Everything that the job put into the caches below `cache`. Links are not followed.

    A model, or the output of a run, that somebody keeps in the same folders is none of it.
    """
    for kind in KINDS:
        for path in folders(cache / kind):
            whole = not _HALF.match(path.name)
            stamps = [path / name for name in (USED, COMPLETE, MADE)]
            if whole and not (path / (MADE if kind == PREPARED else COMPLETE)).is_file():
                continue
            with suppress(FileNotFoundError):  # others remove too
                times = [stamp.stat().st_mtime for stamp in stamps if stamp.exists()]
                used = max(times, default=path.stat().st_mtime)
                yield Entry(kind=kind, path=path, bytes=size(path), used=used, whole=whole)


def size(folder: Path) -> int:
    """What the files below a folder take on the disk, in bytes; a file with two names once."""
    seen: dict[tuple[int, int], int] = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                stat = Path(directory, name).lstat()
                seen[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(seen.values())


def may_be_linking(entry: Entry) -> bool:
    """Whether a run may be linking prepared rows into the entry."""
    return not entry.whole and time.time() - entry.used < LINKING_SECONDS


def remove(entry: Entry) -> bool:
    """Removes an entry, unless a process uses or fills it; tells whether it did.

    OSError as the system raises it: also if the disk knows no locks, so that nobody can tell.
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
        for lock in held:  # whoever waits for it sees that it is gone, and makes a new one
            lock.path.unlink(missing_ok=True)
        return True
    finally:
        for lock in held:
            lock.close()


def discard(folder: Path) -> None:
    """Removes a folder: nobody finds half of it under its name. OSError as the system raises it."""
    trash = folder
    if not folder.name.startswith(TRASH):
        trash = folder.with_name(f"{TRASH}{secrets.token_hex(8)}")
        folder.rename(trash)
    shutil.rmtree(trash)


def make_room(cache: Path, limit: int, more: int = 0, *, keep: Path | None = None) -> None:
    """Removes whole entries until all of them and `more` bytes take at most `limit` bytes.

    Those that were not used for longest go first; never one that is in use, or `keep`.
    """
    found = sorted(entries(cache), key=lambda entry: entry.used)
    total = sum(entry.bytes for entry in found) + more
    for entry in found:
        if total <= limit:
            return
        if entry.path == keep or not entry.whole:
            continue
        try:
            gone = remove(entry)
        except OSError as error:
            log.debug("a cache entry could not be removed", entry=entry.path, reason=error)
            continue
        if gone:
            total -= entry.bytes
            log.info("removed from the cache", entry=entry.path, size=log.amount(entry.bytes))
    if total > limit:
        log.warn(
            "the cache is larger than runtime.cache_limit: what is left is in use, or needed now",
            size=log.amount(total),
            limit=log.amount(limit),
        )


def folders(folder: Path) -> list[Path]:
    try:
        return sorted(
            Path(each) for each in os.scandir(folder) if each.is_dir(follow_symlinks=False)
        )
    except OSError:
        return []
