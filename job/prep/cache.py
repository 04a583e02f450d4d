"""Caches prepared rows on this machine by fingerprint, for runs with other outputs.

Entries are hard links to the files of the run that prepared them, so they take no space while that
run's own files exist. Without hard links nothing is cached.

An entry is written to a temporary folder and renamed. A reader links its files first and then
verifies their digests, since an entry may be removed at any time.
"""

import errno
import json
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from job import log
from job.local.eviction import PARTIAL, PREPARED_RECORD, discard
from job.storage.digests import digest_tree

MAX_ENTRIES = 4
"""Entries to keep; the least recently used are removed."""
_FILES = "data"


def restore(cache: Path, identity: str, directory: Path) -> dict[str, int] | None:
    """Fills `directory` from the entry of this identity and returns its row counts.

    None if there is no entry, or if it is damaged.
    """
    entry = cache / identity[:32]
    try:
        record = json.loads((entry / PREPARED_RECORD).read_text(encoding="utf-8"))
        files, rows = record["files"], {str(key): int(n) for key, n in record["rows"].items()}
        _link(entry / _FILES, directory)
        if [[file.path, file.sha256] for file in digest_tree(directory)] == files:
            with suppress(OSError):  # a read-only cache can still be used
                (entry / PREPARED_RECORD).touch()
            return rows
        damage = "its files have changed"
    except FileNotFoundError as error:
        damage = "" if not entry.exists() else f"a file is missing: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        damage = f"its record is invalid: {error}"
    except OSError as error:  # the entry may still be usable for another run
        log.debug("cannot link prepared rows from the cache", entry=entry, reason=error)
        damage = ""
    shutil.rmtree(directory, ignore_errors=True)
    if damage:
        log.warn("cached rows are damaged; preparing them again", entry=entry, why=damage)
        with suppress(OSError):
            discard(entry)
    return None


def store(cache: Path, identity: str, directory: Path, rows: dict[str, int]) -> None:
    """Caches the files in `directory` under this identity; if that fails, it only logs why."""
    entry = cache / identity[:32]
    partial = cache / f"{PARTIAL}{identity[:32]}-{secrets.token_hex(8)}"
    try:
        _link(directory, partial / _FILES)
        files = [[file.path, file.sha256] for file in digest_tree(partial / _FILES)]
        (partial / PREPARED_RECORD).write_text(
            json.dumps({"rows": rows, "files": files}), encoding="utf-8"
        )
        try:
            partial.rename(entry)
        except OSError:
            if not entry.exists():  # otherwise another run has cached the same rows
                raise
        _evict_oldest(cache)
    except OSError as error:
        write = log.debug if error.errno == errno.EXDEV else log.info
        write("cannot cache prepared rows for other runs", reason=error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _evict_oldest(cache: Path) -> None:
    records = []
    for record in cache.glob(f"[!.]*/{PREPARED_RECORD}"):
        with suppress(FileNotFoundError):  # another run evicts too
            records.append((record.stat().st_mtime, record))
    for _, record in sorted(records)[:-MAX_ENTRIES]:
        with suppress(OSError):
            discard(record.parent)


def _link(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        os.link(path, target / path.name)
