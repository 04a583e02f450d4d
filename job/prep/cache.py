"""Prepared rows kept on this machine by what they were made of, for runs with another output.

They are hard links to the files of the run that made them, so keeping them takes no room while that
run's own are there. Where links are not possible, nothing is kept.
"""

import json
import os
import shutil
from pathlib import Path

from job import log
from job.manifest import digest_tree

KEPT = 4
"""Sets of rows that are kept; the one that was not used for longest goes first."""
_MARK, _ROWS = "made.json", "data"


def take(cache: Path, identity: str, directory: Path) -> dict[str, int] | None:
    """Fills `directory` with what was made of the same; its row counts, or None where it is not
    there, or not as it was made."""
    kept = cache / identity[:32]
    try:
        made = json.loads((kept / _MARK).read_text(encoding="utf-8"))
        found = [[file.path, file.sha256] for file in digest_tree(kept / _ROWS)]
        if found == made["files"]:
            _link(kept / _ROWS, directory)
            (kept / _MARK).touch()
            return dict(made["rows"])
    except (OSError, ValueError, KeyError) as error:  # another job may remove it at any time
        log.debug("no rows were prepared before", reason=error)
    shutil.rmtree(directory, ignore_errors=True)
    shutil.rmtree(kept, ignore_errors=True)
    return None


def keep(cache: Path, identity: str, directory: Path, rows: dict[str, int]) -> None:
    """Keeps what is in `directory` under the identity of what it was made of."""
    kept = cache / identity[:32]
    partial = kept.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _link(directory, partial / _ROWS)
        files = [[file.path, file.sha256] for file in digest_tree(partial / _ROWS)]
        (partial / _MARK).write_text(json.dumps({"rows": rows, "files": files}), encoding="utf-8")
        partial.rename(kept)
        used = sorted(cache.glob(f"*/{_MARK}"), key=lambda mark: mark.stat().st_mtime)
        for mark in used[:-KEPT]:
            shutil.rmtree(mark.parent, ignore_errors=True)
    except OSError as error:
        log.debug("prepared rows are not kept for other runs", reason=error)
        shutil.rmtree(partial, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        os.link(path, target / path.name)
