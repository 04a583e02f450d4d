"""Prepared rows kept on this machine by what they were made of, for runs with another output.

They are hard links to the files of the run that made them, so keeping them takes no room while that
run's own are there. Where links are not possible, nothing is kept.

An entry appears whole, by one renaming of a folder that nobody else knows. Whoever takes one links
its files first and compares the digests of what it has then: an entry may be removed at any time.
"""

import errno
import json
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from job import log
from job.local.eviction import MADE, PARTIAL, discard
from job.storage.digests import digest_tree

KEPT = 4
"""Sets of rows that are kept; the one that was not used for longest goes first."""
_ROWS = "data"


def take(cache: Path, identity: str, directory: Path) -> dict[str, int] | None:
    """Fills `directory` with what was made of the same; its row counts, or None where it is not
    there, or not as it was made."""
    kept = cache / identity[:32]
    try:
        made = json.loads((kept / MADE).read_text(encoding="utf-8"))
        wanted, rows = made["files"], {str(key): int(n) for key, n in made["rows"].items()}
        _link(kept / _ROWS, directory)
        if [[file.path, file.sha256] for file in digest_tree(directory)] == wanted:
            with suppress(OSError):  # a cache that may not be written is one all the same
                (kept / MADE).touch()
            return rows
        reason = "its files are not as they were made"
    except FileNotFoundError as error:
        reason = "" if not kept.exists() else f"a file is missing: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"its record cannot be read: {error}"
    except OSError as error:  # what cannot be linked here may serve another run
        log.debug("prepared rows cannot be taken from the cache", entry=kept, reason=error)
        reason = ""
    shutil.rmtree(directory, ignore_errors=True)
    if reason:
        log.warn("prepared rows in the cache are damaged; preparing anew", entry=kept, why=reason)
        with suppress(OSError):
            discard(kept)
    return None


def keep(cache: Path, identity: str, directory: Path, rows: dict[str, int]) -> None:
    """Keeps what is in `directory` under the identity of what it was made of.

    Where that is not possible the log says why, and the run goes on.
    """
    kept = cache / identity[:32]
    partial = cache / f"{PARTIAL}{identity[:32]}-{secrets.token_hex(8)}"
    try:
        _link(directory, partial / _ROWS)
        files = [[file.path, file.sha256] for file in digest_tree(partial / _ROWS)]
        (partial / MADE).write_text(json.dumps({"rows": rows, "files": files}), encoding="utf-8")
        try:
            partial.rename(kept)
        except OSError:
            if not kept.exists():  # else another run was first, with the same rows
                raise
        _forget_old(cache)
    except OSError as error:
        say = log.debug if error.errno == errno.EXDEV else log.info
        say("prepared rows are not kept for other runs", reason=error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _forget_old(cache: Path) -> None:
    used = []
    for mark in cache.glob(f"[!.]*/{MADE}"):
        with suppress(FileNotFoundError):  # others forget too
            used.append((mark.stat().st_mtime, mark))
    for _, mark in sorted(used)[:-KEPT]:
        with suppress(OSError):
            discard(mark.parent)


def _link(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        os.link(path, target / path.name)
