"""WebDataset archives: members of one stem make a row, `a/1.png` + `a/1.txt`.

An archive is read as a stream and never unpacked to disk, so no name in it can lead anywhere.
Links, devices, sparse and oversized members are refused by their headers.
"""

import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from job import storage
from job.errors import DataError
from job.prep.find import PICTURES, TEXTS, SourceFile
from job.prep.readers.record import MAX_LINE, Record

MAX_HEADER = 2**20
"""Bytes of a name or of the extended headers of a member."""


class _Member(tarfile.TarInfo):
    """A member whose extended headers are bounded: `tarfile` reads them into memory whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if self.type not in tarfile.SUPPORTED_TYPES or (
            self.type not in tarfile.REGULAR_TYPES and self.size > MAX_HEADER
        ):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def webdataset(file: SourceFile, offset: int = 0) -> Iterator[Record]:
    """The archive's rows. Raises DataError where it is damaged.

    `offset` is where a row's first member begins; only plain archives tell it.
    """
    key, values, problem, begins = None, dict[str, object](), None, 0
    try:
        with ExitStack() as stack:
            stream = stack.enter_context(storage.open_read(file.uri))
            plain = stream.read(tarfile.BLOCKSIZE)[257:262] == b"ustar"  # else it is compressed
            stream.seek(offset)
            archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member))
            for member in archive:
                if member.isdir():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if key != (folder, stem):
                    if key is not None:
                        yield _record(file, key, values, problem, begins if plain else None)
                    values, problem, begins = {}, None, offset + member.offset
                key = (folder, stem)
                reason = refused(member)
                if reason:
                    problem = problem or f"member {member.name[:200]!r} {reason}"
                else:
                    content = archive.extractfile(member)
                    assert content is not None, "it is a regular file"
                    values[ending.lower()] = content.read()
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            if key is not None:
                yield _record(file, key, values, problem, begins if plain else None)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            file.name,
            f"is not a readable tar archive: {error}",
            fix="check that the file was copied whole",
        ) from error


def refused(member: tarfile.TarInfo) -> str | None:
    """Why a member is not read, by its header alone; None where it is."""
    if member.islnk() or member.issym():
        return "is a link"
    if not member.isfile() or member.issparse():
        return "is no plain file"
    if member.name.startswith("/") or "\\" in member.name or ".." in member.name.split("/"):
        return "has a path that leaves the archive"
    if member.size > MAX_LINE:
        return f"has {member.size} bytes, more than {MAX_LINE}"
    return None


def _record(
    file: SourceFile,
    key: tuple[str, str],
    parts: dict[str, object],
    problem: str | None,
    offset: int | None,
) -> Record:
    row_id, values = f"{file.name}:{'/'.join(filter(None, key))}", dict[str, object]()
    try:
        for ending, data in parts.items():
            assert isinstance(data, bytes)
            if f".{ending}" in PICTURES:
                values["image"] = values[ending] = data
            elif ending == "json":
                inner = json.loads(data)
                values |= inner if isinstance(inner, dict) else {"json": inner}
            elif f".{ending}" in TEXTS:
                values["text"] = values[ending] = data.decode("utf-8-sig").strip()
            else:
                values[ending] = data
    except (ValueError, RecursionError) as error:
        problem = problem or f"member .{ending} cannot be read: {error}"
    if problem:
        return Record(id=row_id, base="", problem=problem, offset=offset)
    return Record(id=row_id, base="", values=values, offset=offset)
