"""`job verify`: every byte of a finished run against what the run wrote down. It only reads."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from job import log, storage
from job.artifacts.output import LEASES, RUN, STAGES, SUCCESS, SUMS
from job.artifacts.records import StageRecord
from job.artifacts.unfinished import SUFFIX
from job.errors import DataError, InputError, MissingInputError, Problem, StorageError
from job.spec.rules.locations import FOLDERS, LOGS
from job.storage.digests import FileDigest
from job.train.checkpoint.storage import MANIFEST

CHECKPOINTS = "checkpoints"
FILES_AT_ONCE = 4
SHOWN = 100
"""Problems that are told one by one; of more, the number."""
_AGAIN = "remove {marker} at the output and run the spec again: that stage is made anew"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found whole."""

    files: int
    bytes: int
    checkpoints: int


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a finished run wrote down about itself, as it was read."""

    success: str
    sums: str
    record: str
    stages: Mapping[str, StageRecord]
    """By the markers."""
    unreadable: Collection[str]
    """The paths of markers that are told of already."""


def verify(uri: str) -> Verified:
    """Checks the files of the run at `uri`, its stages' markers, its records and checkpoints.

    Raises DataError that names every file which differs, is missing, or is in a run's folder and
    named by no record; InputError if the run is not finished or may not be read; StorageError if
    it changes meanwhile.
    """
    run, problems = _read(uri)
    wanted, unread = _files(run)
    problems += unread
    problems += _lineage(run, wanted)
    problems += _superfluous(uri, run, wanted)
    checkpoints, unread = _checkpoints(uri)
    problems += unread
    every = [*wanted.values(), *checkpoints]
    problems += _bytes(uri, every)
    now = tuple(_text(uri, path) or "" for path in (SUCCESS, SUMS, RUN))
    if now != (run.success, run.sums, run.record):
        raise StorageError(uri, "the run changed while it was verified", fix="verify it again")
    if problems:
        told = [_problem(uri, *each) for each in problems[:SHOWN]]
        if len(problems) > SHOWN:
            told.append(Problem(uri, f"and {len(problems) - SHOWN} more problems"))
        raise DataError.from_problems(told)
    return Verified(
        files=len(wanted),
        bytes=sum(file.size for file in every),
        checkpoints=len({file.path.split("/")[1] for file in checkpoints}),
    )


Found = tuple[str, str, str]
"""What is wrong: a path, what it is, and what to do."""


def _problem(uri: str, path: str, what: str, fix: str) -> Problem:
    return Problem(storage.join(uri, path), what, fix=fix)


def _read(uri: str) -> tuple[_Run, list[Found]]:
    success = _text(uri, SUCCESS)
    if success is None:
        raise InputError(
            storage.join(uri, SUCCESS),
            "is missing, so the run is not finished",
            fix="wait for the job, or run its spec again: it goes on where it stopped",
        )
    stages, unreadable, problems = dict[str, StageRecord](), set[str](), list[Found]()
    for entry in storage.list_files(storage.join(uri, STAGES)):
        if entry.path.endswith(SUFFIX):
            continue
        marker = f"{STAGES}/{entry.path}"
        try:
            record = StageRecord.from_json(json.loads(storage.read_text(storage.join(uri, marker))))
        except (ValueError, KeyError, TypeError) as error:
            again = _AGAIN.format(marker=marker)
            problems.append((marker, f"the marker is unreadable: {error}", again))
            unreadable.add(marker)
        else:
            stages[record.name] = record
    run = _Run(
        success=success,
        sums=_text(uri, SUMS) or "",
        record=_text(uri, RUN) or "",
        stages=stages,
        unreadable=unreadable,
    )
    return run, problems


def _files(run: _Run) -> tuple[dict[str, FileDigest], list[Found]]:
    """The files that `SHA256SUMS` names, with their sizes by the markers."""
    sizes = {file.path: file.size for record in run.stages.values() for file in record.files}
    found, problems = dict[str, FileDigest](), list[Found]()
    for line in run.sums.splitlines():
        digest, _, path = line.partition("  ")
        try:
            file = FileDigest.from_json(
                {"path": path, "size": sizes.get(path, -1), "sha256": digest}
            )
        except ValueError as error:
            problems.append((SUMS, str(error), "run the spec again"))
        else:
            found[path] = file
    if not found:
        problems.append((SUMS, "is missing, or names no file", "run the spec again"))
    return found, problems


def _lineage(run: _Run, wanted: Mapping[str, FileDigest]) -> Iterator[Found]:
    """Where `_SUCCESS`, `SHA256SUMS`, `run.json` and the markers tell of different runs."""
    again = "run the spec again: complete stages are skipped"
    try:
        success = json.loads(run.success) if run.success.strip() else {}
    except ValueError:
        success = {}
    sealed = success.get("sha256sums") if isinstance(success, dict) else None
    if sealed not in (None, hashlib.sha256(run.sums.encode()).hexdigest()):
        yield SUMS, f"is not the one that {SUCCESS} was written for", again
    try:
        record: dict[str, Any] = json.loads(run.record)
        stages = {name: StageRecord.from_json(each) for name, each in record["stages"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield RUN, f"is missing or unreadable: {type(error).__name__}: {error}", again
        return
    if record.get("status") != "succeeded":
        yield RUN, f"says {record.get('status')} where {SUCCESS} says that it succeeded", again
    named = set[str]()
    for name, told in stages.items():
        marker, marked = f"{STAGES}/{name}.json", run.stages.get(name)
        named |= {file.path for file in told.files}
        if marked is None:
            if marker not in run.unreadable:
                yield marker, f"is missing, and {RUN} says that the stage is complete", again
        elif marked.fingerprint != told.fingerprint or marked.files != told.files:
            yield marker, f"tells of another making of the stage than {RUN}", again
        for file in told.files:
            if file.path in wanted and wanted[file.path].sha256 != file.sha256:
                yield file.path, f"has one digest in {SUMS} and another in {RUN}", again
    for path in sorted(named ^ wanted.keys()):
        where, other = (RUN, SUMS) if path in named else (SUMS, RUN)
        yield path, f"is named by {where} and not by {other}", again


def _superfluous(uri: str, run: _Run, wanted: Mapping[str, FileDigest]) -> Iterator[Found]:
    """Files in the folders of the run that no record names.

    Also in those that this run has not made: weights that lie in `merged/` are loaded as its own.
    """
    known = {file.path for record in run.stages.values() for file in record.files} | wanted.keys()
    made = {path.split("/")[0] for path in wanted if "/" in path}
    for folder in sorted((made | {*FOLDERS}) - {CHECKPOINTS, STAGES, LEASES, LOGS}):
        for entry in storage.list_files(storage.join(uri, folder)):
            path = f"{folder}/{entry.path}"
            if path not in known:
                fix = "remove it, or move it out of the run's folders"
                yield path, "is not of this run: no record names it", fix


def _checkpoints(uri: str) -> tuple[list[FileDigest], list[Found]]:
    """The files of all checkpoints by their manifests; each has to have one, and no other file."""
    steps: dict[str, set[str]] = {}
    for entry in storage.list_files(storage.join(uri, CHECKPOINTS)):
        step, _, path = entry.path.partition("/")
        steps.setdefault(step, set()).add(path)
    files, problems = list[FileDigest](), list[Found]()
    for step, there in sorted(steps.items()):
        folder = f"{CHECKPOINTS}/{step}"
        fix = f"remove {folder}: nothing but a resumed training reads it"
        try:
            text = storage.read_text(storage.join(uri, folder, MANIFEST))
            named = [FileDigest.from_json(each) for each in json.loads(text)["files"]]
        except MissingInputError:
            problems.append((folder, "has no manifest, so it was not stored whole", fix))
            continue
        except (ValueError, KeyError, TypeError) as error:
            problems.append((f"{folder}/{MANIFEST}", f"is unreadable: {error}", fix))
            continue
        for path in sorted(there - {MANIFEST} - {file.path for file in named}):
            problems.append((f"{folder}/{path}", "is not named by the manifest", fix))
        files += [
            FileDigest(path=f"{folder}/{file.path}", size=file.size, sha256=file.sha256)
            for file in named
        ]
    return files, problems


def _bytes(uri: str, files: Sequence[FileDigest]) -> list[Found]:
    """Reads every file, a few at once, and compares size and SHA-256."""
    found = list[Found]()

    def check(file: FileDigest) -> tuple[FileDigest, str | None]:
        try:
            with storage.open_read(storage.join(uri, file.path)) as stream:
                digest, size = _digest(stream.read)
        except MissingInputError:
            return file, "is missing"
        if file.size >= 0 and size != file.size:
            return file, f"has {size} bytes instead of {file.size}"
        return file, None if digest == file.sha256 else "has other bytes: its SHA-256 differs"

    total = -(-sum(max(file.size, 0) for file in files) // 2**20)
    with (
        ThreadPoolExecutor(FILES_AT_ONCE, "verify") as pool,
        log.progress("verify", total, "MiB") as bar,
    ):
        done = shown = 0
        for file, problem in pool.map(check, files):
            if problem is not None:
                fix = "remove the marker of its stage in .stages/ and run again, or the checkpoint"
                found.append((file.path, problem, fix))
            done += max(file.size, 0)
            if more := done // 2**20 - shown:
                bar.advance(more)
                shown += more
    return found


def _digest(read: Callable[[int], bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while block := read(2**20):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _text(uri: str, path: str) -> str | None:
    try:
        return storage.read_text(storage.join(uri, path))
    except MissingInputError:
        return None
