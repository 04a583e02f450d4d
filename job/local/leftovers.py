"""What runs and downloads left on this machine, and its removal.

Only what this project made is looked at: folders below the work folder that say whose they are, and
entries of the caches. What a living process holds is never removed.
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
from job.local.work_folder import EARLIER, HELD, lives_elsewhere

State = Literal["in use", "left", "unused", "kept"]
EARLIER_PARTS = {"stages", "trainer", "logs", "pictures"}
"""What the work folders hold of versions that left no note of whose they are."""
EARLIER_SECONDS = 86400.0
"""How long such a folder must not have changed: nobody can tell whether it is held."""
DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """A folder that the job made."""

    kind: str
    """`work`, or a kind of cache."""
    path: Path
    bytes: int
    age_seconds: float
    """Since it was last used."""
    state: State
    """`in use` by a living process; `left` by a run or a download that ended halfway; `unused` for
    longer than asked; or `kept`."""
    entry: eviction.Entry | None = None
    """None of a work folder."""
    of: str = ""
    """The output of a work folder, or who holds it."""

    @property
    def goes(self) -> bool:
        """Whether cleaning removes it."""
        return self.state in ("left", "unused")


def look(cache: Path, work: Path, *, unused_days: float, limit: int) -> list[Found]:
    """Everything below the cache and the work folder, largest first.

    A cache entry goes if it was not used for `unused_days`, or if all of them take more than
    `limit` bytes (zero: no limit); then those go first that were not used for longest.
    """
    now = time.time()
    caches = sorted(eviction.entries(cache), key=lambda entry: entry.used)
    over = sum(entry.bytes for entry in caches if entry.whole) - limit if limit else 0
    found = list(_work_folders(work, now))
    for entry in caches:
        state: State = "left"
        if _in_use(entry):
            state = "in use"
        elif entry.whole:
            state = "unused" if now - entry.used >= unused_days * DAY or over > 0 else "kept"
            over -= entry.bytes if state == "unused" else 0
        found.append(
            Found(
                kind=entry.kind,
                path=entry.path,
                bytes=entry.bytes,
                age_seconds=max(0.0, now - entry.used),
                state=state,
                entry=entry,
            )
        )
    return sorted(found, key=lambda each: -each.bytes)


def remove(found: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """Removes what goes; gives what was removed, and what a process has taken meanwhile.

    Raises InputError at the end for what may not be removed.
    """
    gone: list[Found] = []
    taken: list[Found] = []
    problems: list[Problem] = []
    for each in (one for one in found if one.goes):
        try:
            removed = eviction.remove(each.entry) if each.entry else _remove_work(each.path)
        except FileNotFoundError:  # another removed it first
            removed = True
        except OSError as error:
            reason = f"cannot be removed: {error.strerror or error}"
            fix = "clean as the user who made it"
            problems.append(Problem(str(each.path), reason, fix=fix))
            continue
        (gone if removed else taken).append(each)
    if problems:
        raise InputError.from_problems(problems)
    return gone, taken


def _work_folders(root: Path, now: float) -> Iterator[Found]:
    for path in eviction.folders(root):
        held = path / HELD
        state: State = "left"
        if held.is_file():
            of = str(locks.said(held).get("output", ""))
            used = held.stat().st_mtime
            if not _free(path):
                state, of = "in use", f"{of}, held by {locks.holder(held) or 'a process'}"
        elif path.name.startswith(eviction.TRASH):
            of, used = "", path.stat().st_mtime
        elif EARLIER.search(path.name) and _is_earlier(path):
            of, used = "", _changed(path)
            state = "left" if now - used > EARLIER_SECONDS else "in use"
        else:
            continue  # not the job's
        yield Found(
            kind="work",
            path=path,
            bytes=eviction.size(path),
            age_seconds=max(0.0, now - used),
            state=state,
            of=of,
        )


def _remove_work(path: Path) -> bool:
    held = path / HELD
    if not held.is_file():
        eviction.discard(path)
        return True
    lock = locks.take(held)
    if lock is None:
        return False
    try:
        if lives_elsewhere(path):
            return False
        eviction.discard(path)
    finally:
        lock.close()
    return True


def _free(path: Path) -> bool:
    """Whether nobody holds a work folder; False where nobody can tell."""
    try:
        lock = locks.take(path / HELD, shared=True)
    except OSError:
        return False
    if lock is None:
        return False
    lock.close()
    return not lives_elsewhere(path)


def _in_use(entry: eviction.Entry) -> bool:
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
            return True  # nobody can tell
        if lock is None:
            return True
        lock.close()
    return False


def _is_earlier(path: Path) -> bool:
    parts = {each.name for each in path.iterdir()}
    return bool(parts) and parts <= EARLIER_PARTS


def _changed(path: Path) -> float:
    times = [path.stat().st_mtime]
    for each in path.rglob("*"):
        with suppress(OSError):
            times.append(each.lstat().st_mtime)
    return max(times)
