"""WebDataset archives: members of one stem make a row, `a/1.png` + `a/1.txt`.

An archive is read as a stream and never unpacked to disk, so no name in it can lead anywhere.
Links, devices, sparse and oversized members are refused by their headers.
"""

import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from job import storage
from job.errors import DataError
from job.prep.discovery import PICTURES, TEXTS, SourceFile
from job.prep.globs import is_junk
from job.prep.readers import contents
from job.prep.readers.record import MAX_LINE, Record

MAX_HEADER = 2**20
"""Bytes of a name or of the extended headers of a member."""
MAX_LABEL = 2**20
"""Bytes of a member that may be a text."""


_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Headers that tell about the member behind them, or about all: dates, long names."""


class _Member(tarfile.TarInfo):
    """A member whose extended headers are bounded: `tarfile` reads them into memory whole."""

    def _proc_member(self, archive: Any) -> Any:
        extended = self.type in _EXTENDED
        if not extended and self.type not in tarfile.SUPPORTED_TYPES:
            raise tarfile.ReadError(f"a header of an unknown type, {self.type!r}")
        # Headers about all members are kept to the end, the others up to their member.
        kept = getattr(archive, "kept", 0)
        before = getattr(archive, "before", 0) if extended else 0
        size = self.size if self.type not in tarfile.REGULAR_TYPES else 0
        if kept + before + size > MAX_HEADER:
            raise tarfile.ReadError(f"headers of {kept + before + size} bytes")
        archive.kept = kept + size if self.type == tarfile.XGLTYPE else kept
        archive.before = before + size if extended and self.type != tarfile.XGLTYPE else 0
        return super()._proc_member(archive)  # type: ignore[misc]


def webdataset(file: SourceFile, offset: int = 0) -> Iterator[Record]:
    """The archive's rows. Raises DataError if it is damaged.

    `offset` is where a row's first member begins; only plain archives tell it.
    """
    key, values, problem, begins, passed = None, dict[str, object](), None, 0, 0
    try:
        with ExitStack() as stack:
            stream = stack.enter_context(storage.open_read(file.uri))
            plain = stream.read(tarfile.BLOCKSIZE)[257:262] == b"ustar"  # else it is compressed
            stream.seek(offset)
            archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member))
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                if member.isdir():
                    continue
                if is_junk(member.name):
                    passed += 1
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if key != (folder, stem):
                    if key is not None:
                        at = begins if plain else None
                        yield replace(_record(file, key, values, problem, at), passed_over=passed)
                        passed = 0
                    values, problem, begins = {}, None, offset + member.offset
                key = (folder, stem)
                reason = refused(member)
                if reason is None and ending.lower() in values:
                    reason = "is there twice"
                if reason:
                    problem = problem or f"member {member.name[:200]!r} {reason}"
                else:
                    content = archive.extractfile(member)
                    assert content is not None, "it is a regular file"
                    values[ending.lower()] = content.read()
            if key is not None:
                at = begins if plain else None
                yield replace(_record(file, key, values, problem, at), passed_over=passed)
    except (tarfile.TarError, EOFError, OSError, RecursionError) as error:
        contents.refuse_stored(file)
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
    inner: object = {}
    try:
        for ending, data in parts.items():
            assert isinstance(data, bytes)
            if ending == "json":
                inner = json.loads(data)
            elif f".{ending}" in TEXTS:
                values[ending] = data.decode("utf-8-sig").strip()
            else:
                values[ending] = data if f".{ending}" in PICTURES else _as_text(data)
    except (ValueError, RecursionError) as error:
        problem = problem or f"member .{ending} cannot be read: {error}"
    if problem:
        return Record(id=row_id, base="", problem=problem, offset=offset)
    for name, endings in (("image", PICTURES), ("text", TEXTS)):
        there = [ending for ending in values if f".{ending}" in endings]
        if len(there) == 1:  # of several the spec has to name one
            values.setdefault(name, values[there[0]])
    if not isinstance(inner, dict):
        inner = {"json": inner}
    # A member wins over what JSON beside it calls by the same name, which is told as not read.
    told = {f"json.{name}" if name in values else name: value for name, value in inner.items()}
    return Record(id=row_id, base="", values={**told, **values}, offset=offset)


def _as_text(data: bytes) -> str | bytes:
    """A member of another ending: text, as of `.cls` or `.caption`, if it is any."""
    if len(data) <= MAX_LABEL:
        with suppress(UnicodeDecodeError):
            return data.decode("utf-8-sig").strip()
    return data
