"""A data source's files, and the digest that identifies their contents."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, cast

from job import storage
from job.local.file_digests import FileDigests
from job.spec.types import FORMULAS
from job.storage.digests import fingerprint

Format = Literal[
    "jsonl", "json", "csv", "tsv", "parquet", "arrow", "imagefolder", "webdataset", "builtin"
]
_SAMPLE_BYTES = 4096  # from either end of an image, to tell it from another


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file to read; for an `imagefolder`, one image and its text file, either of which may be
    missing."""

    name: str
    """For messages and row ids: relative to the folder that all files share."""
    uri: str
    format: Format
    text_uri: str | None = None
    problem: str | None = None
    """Why it is no row, for a text of an `imagefolder` without an image of its own, which is then
    both `uri` and `text_uri`."""


@dataclass(frozen=True, kw_only=True)
class SkippedFiles:
    """Files that make no row, for one reason."""

    files: int
    first: str

    @classmethod
    def of(cls, names: Sequence[str]) -> "SkippedFiles":
        return cls(files=len(names), first=names[0])


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data source that was found; rows and images are read on demand."""

    uri: str
    files: tuple[SourceFile, ...]
    builtin: bool
    skipped: Mapping[str, SkippedFiles] = field(default_factory=dict, compare=False)
    """Files of the folder that make no row, by reason."""
    local_digests: FileDigests = field(default_factory=FileDigests, compare=False, repr=False)

    @cached_property
    def digest(self) -> str:
        """Of contents, for local lists; of names, sizes and versions, if the store has these.

        It may read whole lists, so it is computed on first use.
        """
        return FORMULAS if self.builtin else fingerprint(self._identities())

    def _identities(self) -> list[object]:
        if storage.is_local(self.files[0].uri):
            return list(zip([file.name for file in self.files], self._local(), strict=True))
        return _remote_identities(self.files)

    def _local(self) -> list[object]:
        """By file: the digest of a list; of an image's ends, and of its text."""
        hashed = [
            file.text_uri if file.format == "imagefolder" else file.uri for file in self.files
        ]
        paths = [storage.local_path(uri) for uri in hashed if uri is not None]
        digests = iter(self.local_digests.sha256(paths))
        of_texts = [None if uri is None else next(digests) for uri in hashed]
        return [
            [sample_digest(file.uri), digest] if file.format == "imagefolder" else digest
            for file, digest in zip(self.files, of_texts, strict=True)
        ]


def _remote_identities(files: tuple[SourceFile, ...]) -> list[object]:
    entries = {}
    for folder in {storage.parent(file.uri) for file in files}:
        if not folder.startswith(("http://", "https://")):
            for entry in storage.list_files(folder):
                entries[storage.join(folder, entry.path)] = entry
    identities: list[object] = []
    for file in files:
        uris = [file.uri, *([file.text_uri] if file.text_uri else [])]
        known = [entries.get(uri) for uri in uris]
        if all(entry is not None and entry.version is not None for entry in known):
            identities.append([(e.path, e.size, e.version) for e in known if e is not None])
        else:  # without versions, by contents
            identities.append([(file.name, _sha256(uri)) for uri in uris])
    return identities


def sample_digest(uri: str) -> str:
    """A digest of a local file's size and its first and last 4 KiB: cheap, and without its date.

    Raises OSError if it cannot be read.
    """
    path = storage.local_path(uri)
    if path.exists() and not path.is_file():  # to open a pipe waits for its writer
        raise OSError(f"{path} is not a regular file")
    with path.open("rb") as file:
        size = path.stat().st_size
        head = file.read(_SAMPLE_BYTES)
        file.seek(max(0, size - _SAMPLE_BYTES))
        return hashlib.blake2b(b"%d " % size + head + file.read(), digest_size=16).hexdigest()


def _sha256(uri: str) -> str:
    with storage.open_read(uri) as file:
        return hashlib.file_digest(cast(io.BufferedIOBase, file), "sha256").hexdigest()
