"""`job fetch`: downloads a part of a finished run and checks it against the run's `SHA256SUMS`.

Files are downloaded to a hidden folder in the target and moved into place once all are complete.
The files that loaders open first (configuration and index) are removed first and added last, so
nobody loads incomplete weights, or one run's configuration with another's weights.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from job import log, storage
from job.artifacts.nesting import run_containing
from job.artifacts.output import SUCCESS, SUMS
from job.errors import InputError
from job.local import lock as locks
from job.spec.output_folders import ADAPTER, REINFORCED, SERVED_ADAPTER
from job.storage import local
from job.storage.digests import sha256_file
from job.storage.uri import safe_relative

HIDDEN = ".fetch"
"""The hidden folder of a target: incomplete downloads, the lock, and the record."""
RECORD = "fetched.json"
"""The files of earlier downloads, with their digests."""
LOST_AND_FOUND = "lost+found"
"""The folder that some file systems have at their root."""
ADAPTERS = (ADAPTER, SERVED_ADAPTER)
"""Parts that, of a reinforced run, are those of the reinforced adapter."""
SHOWN = 5
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_LOADED_FIRST = (re.compile(r"\.index\.json$"), re.compile(r"(^|/)(adapter_)?config\.json$"))
"""Files that loaders open first: added in this order, after all others, and removed in reverse."""


def fetch(uri: str, part: str, directory: Path) -> int:
    """Downloads the folder `part` of the run at `uri`; returns its number of files.

    Of a reinforced run, `adapter` and `adapter-vllm` are those in `reinforced/`, which the run
    evaluated and exported. Keeps intact files of an earlier download and replaces the others.
    Raises InputError if the run is not finished or has no such part, if a file differs from what
    the run wrote, or if the folder contains files that no earlier call downloaded.
    """
    part = part.rstrip("/")
    if not storage.exists(storage.join(uri, SUCCESS)):
        raise InputError(
            storage.join(uri, SUCCESS),
            "is missing, so the run is not finished",
            fix="wait for the job, or name the output of one that succeeded",
        )
    digests = _digests(uri)
    if part in ADAPTERS and any(path.startswith(f"{REINFORCED}/{part}/") for path in digests):
        part = f"{REINFORCED}/{part}"
        log.info("the run was reinforced: its reinforced adapter is fetched", part=part)
    wanted = _wanted(uri, part, digests)
    _refuse_outputs(directory)
    if not (directory / HIDDEN).exists():  # a refused folder is left untouched
        Target(directory).require_no_other_files(wanted)
    target = Target(directory)
    with target:
        target.require_no_other_files(wanted)
        missing = {path: digest for path, digest in wanted.items() if target.lacks(path, digest)}
        with log.progress(f"fetch {part}", len(wanted), "files") as bar:
            bar.advance(len(wanted) - len(missing))
            for path, digest in missing.items():
                target.download(storage.join(uri, part, path), path, digest)
                bar.advance()
        target.install(wanted, missing)
    return len(wanted)


def _refuse_outputs(directory: Path) -> None:
    """Raises InputError if the folder belongs to the output of a run."""
    if (run := run_containing(str(storage.resolved_path(str(directory))))) is not None:
        raise InputError(
            "--to",
            f"is inside the output of a run, {run}",
            value=directory,
            fix="name a folder outside of it",
        )


def _digests(uri: str) -> dict[str, str]:
    """The digests of the run's files, by their path in it."""
    sums, digests = storage.join(uri, SUMS), {}
    text = storage.read_text(sums)
    for line in text.splitlines():
        entry = _LINE.fullmatch(line)
        if entry is None or not text.endswith("\n"):
            raise InputError(
                sums,
                "is truncated or was changed: a line is not a digest and a file",
                value=line,
                fix="run the job again: it rewrites the file",
            )
        digests[entry[2]] = entry[1]
    return digests


def _wanted(uri: str, part: str, digests: Mapping[str, str]) -> dict[str, str]:
    """The digests of the part's files, by their path in it."""
    wanted = {
        safe_relative(path, uri).removeprefix(f"{part}/"): digest
        for path, digest in digests.items()
        if path.startswith(f"{part}/")
    }
    if not wanted:
        parts = {path.partition("/")[0] for path in digests if "/" in path}
        raise InputError(
            storage.join(uri, part),
            "the run has no such part",
            fix=f"--part may be {', '.join(sorted(parts)) or 'nothing: the run has no folders'}",
        )
    return wanted


class Target:
    """The folder to download into, locked against other calls as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, list[str]] = {}  # digests of the files of earlier calls
        self._digests: dict[str, str] = {}
        self._lock: locks.Lock | None = None

    def __enter__(self) -> "Target":
        hidden = self._directory / HIDDEN
        try:
            hidden.mkdir(parents=True, exist_ok=True)
            self._lock = locks.wait(hidden / "lock")
        except OSError as error:
            if error.errno not in locks.UNSUPPORTED:
                raise InputError(
                    "--to",
                    f"cannot be written: {error.strerror}",
                    value=self._directory,
                    fix="name a folder that this user may write to",
                ) from error
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads((hidden / RECORD).read_bytes())["files"]
            self._known = {str(path): [str(each) for each in known[path]] for path in known}
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def require_no_other_files(self, wanted: Mapping[str, str]) -> None:
        """Raises InputError if the folder contains files of neither this run nor an earlier call.

        Loaders would mix them with the downloaded files, or replacing them would lose them.
        """
        others = [
            name
            for name in sorted(self._names(wanted))
            if not self._is_replaceable(name, wanted.get(name))
        ]
        if others:
            more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
            raise InputError(
                "--to",
                "holds files that are neither of this run nor unchanged from an earlier fetch: "
                f"{', '.join(others[:SHOWN])}{more}",
                value=self._directory,
                fix="name an empty or a new folder, or move those files away",
            )

    def lacks(self, path: str, digest: str) -> bool:
        """Whether the file is missing or has other bytes."""
        return self._digest(path) != digest

    def download(self, uri: str, path: str, digest: str) -> None:
        """Downloads a file to the hidden folder, unless an interrupted call has done so."""
        staged = self._staged(path)
        if staged.is_file() and sha256_file(staged) == digest:
            return
        storage.download(uri, staged)
        if sha256_file(staged) != digest:
            staged.unlink()
            raise InputError(
                uri, "is not what the run wrote: its SHA-256 differs", fix="export again"
            )

    def install(self, wanted: Mapping[str, str], missing: Collection[str]) -> None:
        """Moves the downloaded files into place and removes those that only earlier calls had."""
        old = self._known.keys() - wanted.keys()
        if missing or old:
            if self._known:
                log.info("replacing files of an earlier fetch", files=len(old | {*missing}))
            # Recorded first, so that the next call recognizes all files if this one fails.
            both = {path: [*self._known.get(path, ()), each] for path, each in wanted.items()}
            self._record({**self._known, **both})
            # Nobody loads weights while the files that are opened first are missing.
            for path in sorted(wanted, key=_rank, reverse=True):
                if _rank(path) and path not in missing:
                    self._move(self._directory / path, self._staged(path))
            for path in sorted(old | {*missing}, key=_rank, reverse=True):
                (self._directory / path).unlink(missing_ok=True)
            for path in sorted([p for p in wanted if p in missing or _rank(p)], key=_rank):
                self._move(self._staged(path), self._directory / path)
            for path in old:
                self._remove_empty((self._directory / path).parent)
        self._record({path: [digest] for path, digest in wanted.items()})
        shutil.rmtree(self._directory / HIDDEN / "files", ignore_errors=True)

    def _names(self, wanted: Mapping[str, str]) -> Iterator[str]:
        """The folder's files that a loader might load, without hidden ones."""
        for path in self._directory.rglob("*"):
            name = path.relative_to(self._directory).as_posix()
            first = name.partition("/")[0]
            if first.startswith(".") or first == LOST_AND_FOUND:
                continue
            if name in wanted or not path.is_dir():
                yield name

    def _is_replaceable(self, name: str, wanted: str | None) -> bool:
        """Whether a file may be replaced: it matches, or an earlier call downloaded it."""
        digest, known = self._digest(name), self._known.get(name, ())
        return digest is not None and (digest == wanted or digest in known or wanted in known)

    def _digest(self, path: str) -> str | None:
        """The digest of the file in place; None if there is none."""
        if path not in self._digests and (self._directory / path).is_file():
            self._digests[path] = sha256_file(self._directory / path)
        return self._digests.get(path)

    def _record(self, files: Mapping[str, Sequence[str]]) -> None:
        text = json.dumps({"files": files}, indent=1)
        local.write(self._directory / HIDDEN / RECORD, f"{text}\n".encode())

    def _move(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._directory and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def _staged(self, path: str) -> Path:
        return self._directory / HIDDEN / "files" / path


def _rank(path: str) -> int:
    """The rank of a file when installing: 0, or higher if loaders open it first."""
    return next((rank for rank, name in enumerate(_LOADED_FIRST, 1) if name.search(path)), 0)
