"""Parts of what a run left, for who only reads it: kept by digest, apart from the run's own files.

The same folder of the same bytes is brought once, whoever asks. A run that is under way meanwhile
may replace a stage: then the new one is brought, never half of each.
"""

import os
import re
from pathlib import Path

from job import log, storage
from job.artifacts.records import STAGES, StageRecord, read_stage
from job.errors import InputError, JobError, MissingInputError, StorageError
from job.local import cache, eviction
from job.storage.digests import fingerprint

TRIES = 3
"""A stage that is replaced so often while it is read is one that nobody can read."""


def fetch(
    uri: str,
    stage: str,
    folder: str,
    cache_dir: Path,
    limit: int,
    only: re.Pattern[str] | None = None,
) -> Path:
    """The files in `folder` of a finished stage of the run at `uri`, on this machine.

    `only` leaves out those whose whole path it does not match. Raises InputError if the stage is
    not finished, has no such folder, or its marker is unreadable; for others see `cache.ensure`.
    """
    for tries in range(1, TRIES + 1):
        record = _record(uri, stage)
        try:
            return _brought(uri, record, folder, only, cache_dir, limit) / folder
        except JobError as error:
            if tries == TRIES or _record(uri, stage) == record:
                raise
            log.info("the stage was made again meanwhile; reading the new one", reason=error)
    raise AssertionError("the last try raises")


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


def _brought(
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
        raise StorageError(
            error.problems[0].field,
            "the file is not the one that the stage stored: its digest differs",
            fix=f"delete {STAGES}/{record.name}.json at the output to make it again",
        ) from error


def _linked(source: Path, path: Path) -> bool:
    """Takes the file without a copy where it lies on the same disk: a run replaces its files, and
    never writes into one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(source.resolve(), path)
    except OSError:
        return False
    return True
