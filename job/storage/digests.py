"""SHA-256 digests of files and trees, verified downloads, and fingerprints of JSON values."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from job import log, storage


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def digest_tree(directory: Path) -> tuple[FileDigest, ...]:
    """Every file under `directory`, sorted by path; read in parallel."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(sha256_file, paths))
    return tuple(
        FileDigest(
            path=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=digest
        )
        for path, digest in zip(paths, digests, strict=True)
    )


def fingerprint(*parts: object) -> str:
    """A digest of JSON values; equal values have equal fingerprints."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
