"""Finds and removes leftovers of runs and downloads on this machine.

Only folders of this project count: work folders with a lock file, and cache entries. What a running
process uses is never removed.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from job.errors import InputError, Problem
from job.local import eviction
from job.local import lock as locks
from job.local.work_folder import LEGACY_NAME, LOCK_FILE, held_on_another_machine

State = Literal["in use", "left", "unused", "kept"]
LEGACY_CONTENT = {"stages", "trainer", "logs", "pictures"}
"""The content of work folders of earlier versions, which have no lock file."""
LEGACY_SECONDS = 86400.0
"""Such a folder counts as in use until it has not changed for this long."""
DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A folder of the job on this machine."""

    kind: str
    """`work`, or a kind of cache."""
    path: Path
    bytes: int
    age_seconds: float
    """Since it was last used."""
    state: State
    """`in use` by a living process; `left` by an interrupted run or download; `unused` for longer
    than the caller allows; or `kept`."""
    entry: eviction.CacheEntry | None = None
    """None for a work folder."""
    of: str = ""
    """For a work folder, the output of its run, and the process that holds it."""

    @property
    def removable(self) -> bool:
        """Whether cleaning removes it."""
        return self.state in ("left", "unused")


def scan(cache: Path, work: Path, *, unused_days: float, limit: int) -> list[Leftover]:
    """Everything below the cache and the work folder, largest first.

    A cache entry is removable if it was not used for `unused_days`, or if all entries take more
    than `limit` bytes (zero: no limit), the least recently used first.
    """
    now = time.time()
    caches = sorted(eviction.entries(cache), key=lambda entry: entry.last_used)
    over = sum(entry.bytes for entry in caches if entry.complete) - limit if limit else 0
    leftovers = list(_work_folders(work, now))
    for entry in caches:
        state: State = "left"
        if _in_use(entry):
            state = "in use"
        elif entry.complete:
            state = "unused" if now - entry.last_used >= unused_days * DAY or over > 0 else "kept"
            over -= entry.bytes if state == "unused" else 0
        leftovers.append(
            Leftover(
                kind=entry.kind,
                path=entry.path,
                bytes=entry.bytes,
                age_seconds=max(0.0, now - entry.last_used),
                state=state,
                entry=entry,
            )
        )
    return sorted(leftovers, key=lambda each: -each.bytes)


def remove(leftovers: Sequence[Leftover]) -> tuple[list[Leftover], list[Leftover]]:
    """Removes what is removable; returns what was removed, and what has come into use.

    Raises InputError at the end for what could not be removed.
    """
    gone: list[Leftover] = []
    now_used: list[Leftover] = []
    problems: list[Problem] = []
    for each in (one for one in leftovers if one.removable):
        try:
            removed = eviction.remove(each.entry) if each.entry else _remove_work(each.path)
        except FileNotFoundError:  # another process removed it first
            removed = True
        except OSError as error:
            reason = f"cannot be removed: {error.strerror or error}"
            fix = "clean as the user who created it"
            problems.append(Problem(str(each.path), reason, fix=fix))
            continue
        (gone if removed else now_used).append(each)
    if problems:
        raise InputError.from_problems(problems)
    return gone, now_used


def _work_folders(root: Path, now: float) -> Iterator[Leftover]:
    for path in eviction.folders(root):
        held = path / LOCK_FILE
        state: State = "left"
        if held.is_file():
            of = str(locks.read(held).get("output", ""))
            used = held.stat().st_mtime
            if not _is_unlocked(path):
                state, of = "in use", f"{of}, held by {locks.holder(held) or 'a process'}"
        elif path.name.startswith(eviction.TRASH):
            of, used = "", path.stat().st_mtime
        elif LEGACY_NAME.search(path.name) and _is_legacy(path):
            of, used = "", _changed(path)
            state = "left" if now - used > LEGACY_SECONDS else "in use"
        else:
            continue  # not of this project
        yield Leftover(
            kind="work",
            path=path,
            bytes=eviction.size(path),
            age_seconds=max(0.0, now - used),
            state=state,
            of=of,
        )


def _remove_work(path: Path) -> bool:
    held = path / LOCK_FILE
    if not held.is_file():
        eviction.discard(path)
        return True
    lock = locks.take(held)
    if lock is None:
        return False
    try:
        if held_on_another_machine(path):
            return False
        eviction.discard(path)
    finally:
        lock.close()
    return True


def _is_unlocked(path: Path) -> bool:
    """Whether no process holds a work folder; False if that cannot be determined."""
    try:
        lock = locks.take(path / LOCK_FILE, shared=True)
    except OSError:
        return False
    if lock is None:
        return False
    lock.close()
    return not held_on_another_machine(path)


def _in_use(entry: eviction.CacheEntry) -> bool:
    if entry.path.name.startswith(eviction.TRASH):
        return False
    if entry.kind == eviction.PREPARED:
        return eviction.may_be_linking(entry)
    name = entry.path.name.removeprefix(eviction.PARTIAL)
    for ending in (eviction.USE, eviction.FILL):
        path = entry.path.with_name(f".{name}{ending}")
        if not path.exists():
            continue
        try:
            lock = locks.take(path)
        except OSError:
            return True  # cannot be determined
        if lock is None:
            return True
        lock.close()
    return False


def _is_legacy(path: Path) -> bool:
    parts = {each.name for each in path.iterdir()}
    return bool(parts) and parts <= LEGACY_CONTENT


def _changed(path: Path) -> float:
    times = [path.stat().st_mtime]
    for each in path.rglob("*"):
        with suppress(OSError):
            times.append(each.lstat().st_mtime)
    return max(times)
