"""`job fetch`: a part of a finished run, on this machine, checked against its `SHA256SUMS`.

What is fetched is put together in a hidden folder of the target and moved in when all of it is
there. The files that a model is loaded by (its configuration and index) go first and come last, so
that nobody loads one run's configuration with another's weights, or half of either.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from job import log, storage
from job.artifacts.nesting import run_written_at
from job.artifacts.output import SUCCESS, SUMS
from job.errors import InputError
from job.local import lock as locks
from job.storage import local
from job.storage.digests import sha256_file
from job.storage.uri import safe_relative

OWN = ".fetch"
"""The hidden folder of a target: what is not whole yet, the lock, and what was fetched before."""
RECORD = "fetched.json"
LOST_AND_FOUND = "lost+found"
"""A disk's own folder, where one is mounted."""
SHOWN = 5
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_LOADED_BY = (re.compile(r"\.index\.json$"), re.compile(r"(^|/)(adapter_)?config\.json$"))
"""What names the weights, and what names the model: come in this order, go in the other."""


def fetch(uri: str, part: str, directory: Path) -> int:
    """Brings the files of folder `part` of the run at `uri`; gives their number.

    What is there already and whole is kept; what an earlier call brought is replaced. Raises
    InputError if the run is not finished or has no such part, if a file is not what the run wrote,
    or if the folder holds files that no earlier call brought.
    """
    part = part.rstrip("/")
    if not storage.exists(storage.join(uri, SUCCESS)):
        raise InputError(
            storage.join(uri, SUCCESS),
            "is missing, so the run is not finished",
            fix="wait for the job, or name the output of one that succeeded",
        )
    wanted = _wanted(uri, part)
    _refuse_outputs(directory)
    if not (directory / OWN).exists():  # nothing is left in a folder that is refused
        Target(directory).require_only(wanted)
    target = Target(directory)
    with target:
        target.require_only(wanted)
        missing = {path: digest for path, digest in wanted.items() if target.lacks(path, digest)}
        with log.progress(f"fetch {part}", len(wanted), "files") as bar:
            bar.advance(len(wanted) - len(missing))
            for path, digest in missing.items():
                target.bring(storage.join(uri, part, path), path, digest)
                bar.advance()
        target.put(wanted, missing)
    return len(wanted)


def _refuse_outputs(directory: Path) -> None:
    """Raises InputError if a run writes to the folder: what is fetched is none of its files."""
    if (run := run_written_at(str(directory.resolve()))) is not None:
        raise InputError(
            "--to",
            f"lies in the output of a run, {run}",
            value=directory,
            fix="name a folder outside of it",
        )


def _wanted(uri: str, part: str) -> dict[str, str]:
    """The digests of the part's files, by their path in it."""
    sums, found, parts = storage.join(uri, SUMS), {}, set[str]()
    text = storage.read_text(sums)
    for line in text.splitlines():
        entry = _LINE.fullmatch(line)
        if entry is None or not text.endswith("\n"):
            raise InputError(
                sums,
                "is cut or was changed: a line is no digest with its file",
                value=line,
                fix="run the job again: it writes the file anew",
            )
        if "/" in entry[2]:
            parts.add(entry[2].partition("/")[0])
        if entry[2].startswith(f"{part}/"):
            found[safe_relative(entry[2], uri).removeprefix(f"{part}/")] = entry[1]
    if not found:
        raise InputError(
            storage.join(uri, part),
            "the run has no such part",
            fix=f"--part may be {', '.join(sorted(parts)) or 'nothing: it left no folders'}",
        )
    return found


class Target:
    """The folder that files are put into; in a `with` no other call fetches into it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, list[str]] = {}  # what earlier calls brought, with its digests
        self._digests: dict[str, str] = {}
        self._lock: locks.Lock | None = None

    def __enter__(self) -> "Target":
        own = self._directory / OWN
        try:
            own.mkdir(parents=True, exist_ok=True)
            self._lock = locks.wait(own / "lock")
        except OSError as error:
            if error.errno not in locks.UNSUPPORTED:
                raise InputError(
                    "--to",
                    f"may not be written: {error.strerror}",
                    value=self._directory,
                    fix="name a folder that this user may write to",
                ) from error
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads((own / RECORD).read_bytes())["files"]
            self._known = {str(path): [str(each) for each in known[path]] for path in known}
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def require_only(self, wanted: Mapping[str, str]) -> None:
        """Raises InputError if the folder holds anything that neither this run nor an earlier call
        put there: it would be loaded with what is fetched, or be lost."""
        strangers = [
            name for name in sorted(self._names(wanted)) if not self._may_go(name, wanted.get(name))
        ]
        if strangers:
            more = f" and {len(strangers) - SHOWN} more" if len(strangers) > SHOWN else ""
            raise InputError(
                "--to",
                "holds files that are neither of this run nor as an earlier fetch brought them: "
                f"{', '.join(strangers[:SHOWN])}{more}",
                value=self._directory,
                fix="name an empty or a new folder, or move those files away",
            )

    def lacks(self, path: str, digest: str) -> bool:
        """Whether the file is not there with these bytes."""
        return self._digest(path) != digest

    def bring(self, uri: str, path: str, digest: str) -> None:
        """A file, to where it waits for the others; one that an interrupted call brought stays."""
        waiting = self._waiting(path)
        if waiting.is_file() and sha256_file(waiting) == digest:
            return
        storage.download(uri, waiting)
        if sha256_file(waiting) != digest:
            waiting.unlink()
            raise InputError(
                uri, "is not what the run wrote: its SHA-256 differs", fix="export again"
            )

    def put(self, wanted: Mapping[str, str], missing: Collection[str]) -> None:
        """Moves what waits to its place, and removes what earlier calls brought beside it."""
        old = self._known.keys() - wanted.keys()
        if missing or old:
            if self._known:
                log.info("what an earlier fetch brought is replaced", files=len(old | {*missing}))
            # A call that is cut off here is to know everything that it finds.
            both = {path: [*self._known.get(path, ()), each] for path, each in wanted.items()}
            self._note({**self._known, **both})
            for path in sorted(
                wanted, key=_turn, reverse=True
            ):  # without these nobody loads the rest
                if _turn(path) and path not in missing:
                    self._move(self._directory / path, self._waiting(path))
            for path in sorted(old | {*missing}, key=_turn, reverse=True):
                (self._directory / path).unlink(missing_ok=True)
            for path in sorted([p for p in wanted if p in missing or _turn(p)], key=_turn):
                self._move(self._waiting(path), self._directory / path)
            for path in old:
                self._remove_empty((self._directory / path).parent)
        self._note({path: [digest] for path, digest in wanted.items()})
        shutil.rmtree(self._directory / OWN / "files", ignore_errors=True)

    def _names(self, wanted: Mapping[str, str]) -> Iterator[str]:
        """What the folder holds and may load with the rest; hidden files do not."""
        for path in self._directory.rglob("*"):
            name = path.relative_to(self._directory).as_posix()
            first = name.partition("/")[0]
            if first.startswith(".") or first == LOST_AND_FOUND:
                continue
            if name in wanted or not path.is_dir():
                yield name

    def _may_go(self, name: str, wanted: str | None) -> bool:
        """Whether a file is wanted as it is, or one that an earlier call brought: unchanged, or
        damaged where the same is brought again."""
        digest, known = self._digest(name), self._known.get(name, ())
        return digest is not None and (digest == wanted or digest in known or wanted in known)

    def _digest(self, path: str) -> str | None:
        """Of the file that is there; None where there is none."""
        if path not in self._digests and (self._directory / path).is_file():
            self._digests[path] = sha256_file(self._directory / path)
        return self._digests.get(path)

    def _note(self, files: Mapping[str, Sequence[str]]) -> None:
        text = json.dumps({"files": files}, indent=1)
        local.write(self._directory / OWN / RECORD, f"{text}\n".encode())

    def _move(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._directory and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def _waiting(self, path: str) -> Path:
        return self._directory / OWN / "files" / path


def _turn(path: str) -> int:
    """When a file comes to its place: zero, unless the others are loaded by it."""
    return next((turn for turn, name in enumerate(_LOADED_BY, 1) if name.search(path)), 0)
