"""`job verify`: checks every byte of a finished run against its records. Read-only."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from job import log, storage
from job.artifacts.output import LEASES, RUN, STAGES, SUCCESS, SUMS
from job.artifacts.records import StageRecord
from job.artifacts.unfinished import SUFFIX
from job.errors import DataError, InputError, MissingInputError, Problem, StorageError
from job.spec.output_folders import FOLDERS, LOGS
from job.storage.digests import FileDigest
from job.train.checkpoint.storage import MANIFEST

CHECKPOINTS, REINFORCE = "checkpoints", "reinforce"
FILES_AT_ONCE = 4
SHOWN = 100
"""The most problems to list; of others only the number is reported."""
_RERUN_STAGE = "remove {marker} at the output and run the spec again: it repeats that stage"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Counts of what was checked and is intact."""

    files: int
    bytes: int
    checkpoints: int


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The records of a finished run, as read."""

    success: str
    sums: str
    record: str
    stages: Mapping[str, StageRecord]
    """From the markers."""
    unreadable: Collection[str]
    """The paths of markers that are reported already."""


class Finding(NamedTuple):
    """A problem with one file."""

    path: str
    message: str
    fix: str


def verify(uri: str) -> Verified:
    """Checks the files of the run at `uri`, its stages' markers, its records and checkpoints.

    Raises DataError naming every file that differs, is missing, or is in a folder of the run but in
    no record; InputError if the run is not finished or cannot be read; StorageError if it changes
    meanwhile.
    """
    run, findings = _read(uri)
    wanted, invalid = _files(run)
    findings += invalid
    findings += _contradictions(run, wanted)
    findings += _unexpected(uri, run, wanted)
    checkpoints, invalid = _checkpoints(uri)
    findings += invalid
    all_files = [*wanted.values(), *checkpoints]
    findings += _mismatches(uri, all_files)
    now = tuple(_text(uri, path) or "" for path in (SUCCESS, SUMS, RUN))
    if now != (run.success, run.sums, run.record):
        raise StorageError(uri, "the run changed while it was verified", fix="verify it again")
    if findings:
        problems = [
            Problem(storage.join(uri, path), message, fix=fix)
            for path, message, fix in findings[:SHOWN]
        ]
        if len(findings) > SHOWN:
            problems.append(Problem(uri, f"and {len(findings) - SHOWN} more problems"))
        raise DataError.from_problems(problems)
    return Verified(
        files=len(wanted),
        bytes=sum(file.size for file in all_files),
        checkpoints=len({_step(file.path.removeprefix(f"{CHECKPOINTS}/")) for file in checkpoints}),
    )


def _read(uri: str) -> tuple[_Run, list[Finding]]:
    success = _text(uri, SUCCESS)
    if success is None:
        raise InputError(
            storage.join(uri, SUCCESS),
            "is missing, so the run is not finished",
            fix="wait for the job, or run its spec again: it resumes",
        )
    stages, unreadable, findings = dict[str, StageRecord](), set[str](), list[Finding]()
    for entry in storage.list_files(storage.join(uri, STAGES)):
        if entry.path.endswith(SUFFIX):
            continue
        marker = f"{STAGES}/{entry.path}"
        try:
            record = StageRecord.parse(storage.read_bytes(storage.join(uri, marker)))
        except ValueError as error:
            fix = _RERUN_STAGE.format(marker=marker)
            findings.append(Finding(marker, f"the marker is unreadable: {error}", fix))
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
    return run, findings


def _files(run: _Run) -> tuple[dict[str, FileDigest], list[Finding]]:
    """The files that `SHA256SUMS` names, with their sizes from the markers."""
    sizes = {file.path: file.size for record in run.stages.values() for file in record.files}
    files, findings = dict[str, FileDigest](), list[Finding]()
    for line in run.sums.splitlines():
        digest, _, path = line.partition("  ")
        if not path:
            findings.append(Finding(SUMS, "has a line that names no file", "run the spec again"))
            continue
        try:
            file = FileDigest.from_json(
                {"path": path, "size": sizes.get(path, -1), "sha256": digest}
            )
        except ValueError as error:
            findings.append(Finding(SUMS, str(error), "run the spec again"))
        else:
            files[path] = file
    if not files:
        findings.append(Finding(SUMS, "is missing, or names no file", "run the spec again"))
    return files, findings


def _contradictions(run: _Run, wanted: Mapping[str, FileDigest]) -> Iterator[Finding]:
    """Checks that `_SUCCESS`, `SHA256SUMS`, `run.json` and the markers agree."""
    fix = "run the spec again: completed stages are skipped"
    try:
        success = storage.parse_json(run.success) if run.success.strip() else {}
    except ValueError:
        success = {}
    digest = success.get("sha256sums") if isinstance(success, dict) else None
    if digest not in (None, hashlib.sha256(run.sums.encode()).hexdigest()):
        yield Finding(SUMS, f"is not the one that {SUCCESS} was written for", fix)
    try:
        record: dict[str, Any] = storage.parse_json(run.record)
        stages = {name: StageRecord.from_json(each) for name, each in record["stages"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"is missing or unreadable: {type(error).__name__}: {error}"
        yield Finding(RUN, message, fix)
        return
    if (status := record.get("status")) != "succeeded":
        yield Finding(RUN, f"says {status}, but {SUCCESS} says that it succeeded", fix)
    named = set[str]()
    for name, recorded in stages.items():
        marker, marked = f"{STAGES}/{name}.json", run.stages.get(name)
        named |= {file.path for file in recorded.files}
        if marked is None:
            if marker not in run.unreadable:
                message = f"is missing, but {RUN} says that the stage is complete"
                yield Finding(marker, message, fix)
        elif marked.fingerprint != recorded.fingerprint or marked.files != recorded.files:
            yield Finding(marker, f"is of another execution of the stage than {RUN}", fix)
        for file in recorded.files:
            if file.path in wanted and wanted[file.path].sha256 != file.sha256:
                yield Finding(file.path, f"has one digest in {SUMS} and another in {RUN}", fix)
    for path in sorted(named ^ wanted.keys()):
        where, other = (RUN, SUMS) if path in named else (SUMS, RUN)
        yield Finding(path, f"is in {where} but not in {other}", fix)


def _unexpected(uri: str, run: _Run, wanted: Mapping[str, FileDigest]) -> Iterator[Finding]:
    """Files in the folders of the run that no record names.

    Also checks folders that this run did not write: stray weights in `merged/` would be loaded.
    """
    known = {file.path for record in run.stages.values() for file in record.files} | wanted.keys()
    written = {path.split("/")[0] for path in wanted if "/" in path}
    for folder in sorted((written | {*FOLDERS}) - {CHECKPOINTS, STAGES, LEASES, LOGS}):
        for entry in storage.list_files(storage.join(uri, folder)):
            path = f"{folder}/{entry.path}"
            if path not in known:
                fix = "remove it, or move it out of the run's folders"
                yield Finding(path, "is not of this run: no record names it", fix)


def _checkpoints(uri: str) -> tuple[list[FileDigest], list[Finding]]:
    """The files of all checkpoints by their manifests, and files that no manifest names."""
    steps: dict[str, set[str]] = {}
    for entry in storage.list_files(storage.join(uri, CHECKPOINTS)):
        step = _step(entry.path)
        steps.setdefault(step, set()).add(entry.path.removeprefix(f"{step}/"))
    files, findings = list[FileDigest](), list[Finding]()
    for step, paths in sorted(steps.items()):
        folder = f"{CHECKPOINTS}/{step}"
        fix = f"remove {folder}: only a resumed training reads it"
        try:
            text = storage.read_bytes(storage.join(uri, folder, MANIFEST))
            named = [FileDigest.from_json(each) for each in storage.parse_json(text)["files"]]
        except MissingInputError:
            findings.append(Finding(folder, "has no manifest, so it is incomplete", fix))
            continue
        except (ValueError, KeyError, TypeError) as error:
            findings.append(Finding(f"{folder}/{MANIFEST}", f"is unreadable: {error}", fix))
            continue
        for path in sorted(paths - {MANIFEST} - {file.path for file in named}):
            findings.append(Finding(f"{folder}/{path}", "is not named by the manifest", fix))
        files += [
            FileDigest(path=f"{folder}/{file.path}", size=file.size, sha256=file.sha256)
            for file in named
        ]
    return files, findings


def _step(path: str) -> str:
    """The folder of a checkpoint's file: `step-N`, or `reinforce/step-N`."""
    parts = path.split("/")
    return "/".join(parts[: 2 if parts[0] == REINFORCE else 1])


def _mismatches(uri: str, files: Sequence[FileDigest]) -> list[Finding]:
    """Reads every file, a few at a time, and compares size and SHA-256."""
    findings = list[Finding]()

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
                findings.append(Finding(file.path, problem, fix))
            done += max(file.size, 0)
            if more := done // 2**20 - shown:
                bar.advance(more)
                shown += more
    return findings


def _digest(read: Callable[[int], bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while block := read(2**20):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _text(uri: str, path: str) -> str | None:
    """The file's text; bytes that are no text are escaped, and so differ from what was written."""
    try:
        return storage.read_bytes(storage.join(uri, path)).decode(errors="backslashreplace")
    except MissingInputError:
        return None
