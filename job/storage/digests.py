"""SHA-256 digests of files and trees, verified downloads, and fingerprints of JSON values."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from job import log, storage

_BLOCK = 2**22
"""Bytes hashed at a time: milliseconds of work, so that threads that hash need not often wait for
one that runs Python."""
SETTLED_NS = 10**8
"""A file is hashed again if it was changed so shortly before the end of the first time. A file
system's clock may be as coarse as 10 ms."""


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """The expected path, relative to its tree, size in bytes and SHA-256 of a file."""

    path: str
    size: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "FileDigest":
        """Raises ValueError for a path that leaves its tree, as only a forged record has."""
        path = PurePosixPath(value["path"])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the path {str(path)!r} leads out of its folder")
        return cls(path=str(value["path"]), size=int(value["size"]), sha256=str(value["sha256"]))


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(max(1, min(size, _BLOCK))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


class TreeDigests:
    """Digests of files that this process writes, each computed once until its file changes.

    Safe for threads: who asks for a file that another thread is hashing waits for it. A change
    shows in the file's size, inode and time of modification; silent corruption by the disk does
    not.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[_State, Future[str]]] = {}
        self._lock = threading.Lock()

    def sha256(self, path: Path) -> str:
        """The file's digest. Raises OSError if it cannot be read."""
        state = _State.of(path)
        with self._lock:
            known = self._known.get(path)
            result: Future[str] = Future()
            if known is None or known[0] != state:
                self._known[path] = state, result
        if known is not None and known[0] == state:
            return known[1].result()
        try:
            digest = sha256_file(path)
        except BaseException as error:
            self._forget(path, result)
            result.set_exception(error)
            raise
        if time.time_ns() < state.modified_ns + SETTLED_NS:
            self._forget(path, result)  # a later change might have the same timestamp
        result.set_result(digest)
        return digest

    def tree(self, directory: Path) -> tuple[FileDigest, ...]:
        """Every file under `directory`, sorted by path; read in parallel."""
        return digest_tree(directory, self.sha256)

    def _forget(self, path: Path, result: Future[str]) -> None:
        with self._lock:
            if path in self._known and self._known[path][1] is result:
                del self._known[path]


@dataclass(frozen=True)
class _State:
    size: int
    inode: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "_State":
        stat = path.stat()
        return cls(stat.st_size, stat.st_ino, stat.st_mtime_ns)


def download_verified(root: str, file: str, target: Path, sha256: str) -> bool:
    """Downloads a file to `target` and checks its digest, with one retry.

    Returns whether it matches; a file that does not is removed.
    """
    for retry in (True, False):
        storage.download(storage.join(root, file), target)
        if sha256_file(target) == sha256:
            return True
        target.unlink()
        if retry:
            log.warn(
                "a downloaded file has the wrong SHA-256; downloading it again",
                file=file,
            )
    return False


def digest_tree(
    directory: Path, sha256: Callable[[Path], str] | None = None
) -> tuple[FileDigest, ...]:
    """Every file under `directory`, sorted by path; read in parallel, or asked of `sha256`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=max(4, min(16, len(os.sched_getaffinity(0))))) as pool:
        digests = list(pool.map(sha256 or sha256_file, paths))
    return tuple(
        FileDigest(
            path=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=digest
        )
        for path, digest in zip(paths, digests, strict=True)
    )


def fingerprint(*parts: object) -> str:
    """A digest of JSON values; equal values have equal fingerprints."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
