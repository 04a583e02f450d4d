"""WebDataset archives: members of the same stem make a row, `a/1.png` + `a/1.txt`.

An archive is read as a stream and never extracted, so no member can escape to another path. Links,
devices, and sparse or oversized members are refused by their headers.
"""

import json
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from job import storage
from job.errors import DataError
from job.prep.globs import is_junk
from job.prep.readers import signatures
from job.prep.readers.record import MAX_LINE, Record, refuse_deep_nesting
from job.prep.source_files import SourceFile
from job.prep.values import IMAGE_SUFFIXES, TEXT_SUFFIXES

MAX_HEADER = 2**20
"""Bytes of a name, or of the extended headers of a member."""
MAX_TEXT_MEMBER = 2**20
"""Bytes of a member that may be text."""


_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Headers that describe the next member, or all members: dates, long names."""


class _Member(tarfile.TarInfo):
    """A member whose extended headers are bounded: `tarfile` reads them into memory whole."""

    def _proc_member(self, archive: "_Archive") -> tarfile.TarInfo:
        extended = self.type in _EXTENDED
        if not extended and self.type not in tarfile.SUPPORTED_TYPES:
            raise tarfile.ReadError(f"a header of an unknown type, {self.type!r}")
        if not extended:
            archive.member_header_bytes = 0
        size = self.size if self.type not in tarfile.REGULAR_TYPES else 0
        total = archive.global_header_bytes + archive.member_header_bytes + size
        if total > MAX_HEADER:
            raise tarfile.ReadError(f"headers of {total} bytes")
        if self.type == tarfile.XGLTYPE:
            archive.global_header_bytes += size
            archive.member_header_bytes = 0
        elif extended:
            archive.member_header_bytes += size
        return super()._proc_member(archive)  # type: ignore[misc]


class _Archive(tarfile.TarFile):
    tarinfo = _Member
    global_header_bytes = 0
    """Of headers about all members, which `tarfile` keeps to the end."""
    member_header_bytes = 0
    """Of headers about the next member."""


@dataclass(kw_only=True)
class _Group:
    """The members of one row."""

    key: tuple[str, str]
    """Folder and stem."""
    offset: int | None
    """Where its first member begins; None in a compressed archive."""
    members: dict[str, bytes] = field(default_factory=dict)
    """By suffix, without the dot."""
    problem: str | None = None
    junk_members: int = 0


def webdataset(file: SourceFile, offset: int = 0) -> Iterator[Record]:
    """The archive's rows, from `offset` on, where a row's first member begins.

    Raises DataError if it is damaged.
    """
    try:
        with storage.open_read(file.uri) as stream:
            for group in _groups(stream, offset):
                yield _record(file, group)
    except (tarfile.TarError, EOFError, OSError, RecursionError) as error:
        signatures.refuse_unreadable(file)
        raise DataError(
            file.name,
            f"is not a readable tar archive: {error}",
            fix="check that the copy is complete",
        ) from error


def _groups(stream: BinaryIO, offset: int) -> Iterator[_Group]:
    group: _Group | None = None
    junk = 0
    compressed = stream.read(tarfile.BLOCKSIZE)[257:262] != b"ustar"
    stream.seek(offset)
    with _Archive.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            if member.isdir():
                continue
            if is_junk(member.name):
                junk += 1
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if group is None or group.key != (folder, stem):
                if group is not None:
                    group.junk_members, junk = junk, 0
                    yield group
                begin = None if compressed else offset + member.offset
                group = _Group(key=(folder, stem), offset=begin)
            _add_member(archive, group, member, suffix.lower())
    if group is not None:
        group.junk_members = junk
        yield group


def _add_member(
    archive: tarfile.TarFile, group: _Group, member: tarfile.TarInfo, suffix: str
) -> None:
    reason = refusal(member)
    if reason is None and suffix in group.members:
        reason = "appears twice"
    if reason:
        group.problem = group.problem or f"member {member.name[:200]!r} {reason}"
        return
    content = archive.extractfile(member)
    assert content is not None, "it is a regular file"
    group.members[suffix] = content.read()


def refusal(member: tarfile.TarInfo) -> str | None:
    """Why a member is refused by its header; None if it is not."""
    if member.islnk() or member.issym():
        return "is a link"
    if not member.isfile() or member.issparse():
        return "is not a regular file"
    if member.name.startswith("/") or "\\" in member.name or ".." in member.name.split("/"):
        return "has a path that leaves the archive"
    if member.size > MAX_LINE:
        return f"has {member.size} bytes, more than {MAX_LINE}"
    return None


def _record(file: SourceFile, group: _Group) -> Record:
    row_id, values = f"{file.name}:{'/'.join(filter(None, group.key))}", dict[str, object]()
    inner: object = {}
    problem = group.problem
    try:
        for suffix, data in group.members.items():
            if suffix == "json":
                inner = json.loads(data)
                refuse_deep_nesting(inner)
            elif f".{suffix}" in TEXT_SUFFIXES:
                values[suffix] = data.decode("utf-8-sig").strip()
            else:
                values[suffix] = data if f".{suffix}" in IMAGE_SUFFIXES else _decode_text(data)
    except (ValueError, RecursionError) as error:
        problem = problem or f"member .{suffix} cannot be read: {error}"
    junk = group.junk_members
    if problem:
        return Record(id=row_id, base="", problem=problem, offset=group.offset, junk_members=junk)
    for name, suffixes in (("image", IMAGE_SUFFIXES), ("text", TEXT_SUFFIXES)):
        present = [suffix for suffix in values if f".{suffix}" in suffixes]
        if len(present) == 1:  # of several, the spec has to name one
            values.setdefault(name, values[present[0]])
    if not isinstance(inner, dict):
        inner = {"json": inner}
    # A member takes precedence over a key of the JSON, which is then reported as ignored.
    keys = {f"json.{name}" if name in values else name: value for name, value in inner.items()}
    values = {**keys, **values}
    return Record(id=row_id, base="", values=values, offset=group.offset, junk_members=junk)


def _decode_text(data: bytes) -> str | bytes:
    """A member of another suffix, as text if possible: a `.cls` or `.caption`."""
    if len(data) <= MAX_TEXT_MEMBER:
        with suppress(UnicodeDecodeError):
            return data.decode("utf-8-sig").strip()
    return data
