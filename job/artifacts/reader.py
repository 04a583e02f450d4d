"""Downloads parts of a run's output for other commands, to a cache keyed by digest.

The same folder with the same content is downloaded once. If a run replaces the stage meanwhile, the
new stage is downloaded, never a mixture.
"""

import os
import re
from pathlib import Path

from job import log, storage
from job.artifacts.local_stages import damaged
from job.artifacts.records import STAGES, StageRecord, read_stage
from job.errors import InputError, JobError, MissingInputError
from job.local import cache, eviction
from job.storage.digests import fingerprint

ATTEMPTS = 3
"""How often to try if the stage is replaced during the download."""


def fetch(
    uri: str,
    stage: str,
    folder: str,
    cache_dir: Path,
    limit: int,
    only: re.Pattern[str] | None = None,
) -> Path:
    """Downloads `folder` of a complete stage of the run at `uri`; returns its local path.

    `only` selects files by full path. Raises InputError if the stage is not complete, has no such
    folder, or its marker is unreadable; for other errors see `cache.ensure`.
    """
    for attempt in range(1, ATTEMPTS + 1):
        record = _record(uri, stage)
        try:
            return _download(uri, record, folder, only, cache_dir, limit) / folder
        except JobError as error:
            if attempt == ATTEMPTS or _record(uri, stage) == record:
                raise
            log.info("the stage was rerun meanwhile; reading the new one", reason=error)
    raise AssertionError("the last attempt raises")


def _record(uri: str, stage: str) -> StageRecord:
    try:
        return read_stage(storage.join(uri, STAGES, f"{stage}.json"))
    except MissingInputError as error:
        raise InputError(
            uri,
            f"holds no finished {stage} stage",
            fix=f"python -m job {stage} SPEC first"
            + (", or --weights base" if stage in ("train", "export") else ""),
        ) from error


def _download(
    uri: str,
    record: StageRecord,
    folder: str,
    only: re.Pattern[str] | None,
    cache_dir: Path,
    limit: int,
) -> Path:
    files = [
        file
        for file in record.files
        if file.path.startswith(f"{folder}/") and (only is None or only.fullmatch(file.path))
    ]
    if not files:
        raise InputError(uri, f"holds no {folder}/", fix="--weights adapter")
    wanted = [cache.ExpectedFile(path=f.path, size=f.size, sha256=f.sha256) for f in files]
    key = fingerprint([(file.path, file.sha256) for file in files])[:32]

    def get(file: cache.ExpectedFile, path: Path) -> None:
        source = storage.join(uri, file.path)
        if not (storage.is_local(uri) and _linked(storage.local_path(source), path)):
            storage.download(source, path)

    try:
        return cache.ensure(cache_dir, eviction.RESULTS, key, wanted, get, source=uri, limit=limit)
    except cache.DigestMismatch as error:
        raise damaged(error.problems[0].field, record) from error


def _linked(source: Path, path: Path) -> bool:
    """Hard-links the file if it is on the same disk; returns whether it did.

    This is safe because runs replace files and never modify them in place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(source.resolve(), path)
    except OSError:
        return False
    return True
