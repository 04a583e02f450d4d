"""Single files and listings, local and remote alike."""

import io
import secrets
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from job.errors import InputError, JobError, MissingInputError, StorageError
from job.storage import connect, failures, local, remote, retry
from job.storage.uri import (
    PROBE,
    WEB,
    has_glob,
    is_hidden,
    is_local,
    is_read_only,
    join,
    local_path,
    safe_relative,
    scheme,
)
from job.storage.write_guard import UNGUARDED, Guard

CHECK_RETRIES = 3
"""An early check tells of a wrong endpoint within seconds rather than after a minute."""


@dataclass(frozen=True)
class Entry:
    """One file of a listing."""

    path: str
    """Relative to the listed root, with `/` between its parts, and always below that root."""
    size: int
    """In bytes."""
    version: str | None = field(default=None, compare=False)
    """What the store calls the contents (an ETag, a blob's id), where it tells one."""
    sha256: str | None = field(default=None, compare=False)
    """Of the contents, where the store tells it, as the hub does for large files."""


def list_files(uri: str) -> tuple[Entry, ...]:
    """Every file below a directory or prefix, sorted by path; empty when there is none.

    Raises InputError for a missing bucket or repository, for a `uri` that is itself a file, and
    for names that could leave the directory that they are copied to.
    """
    if scheme(uri) in WEB:
        raise _no_listing(uri)
    if is_local(uri):
        root = local_path(uri)
        unversioned = retry.call("list", uri, lambda: local.listing(root))
        found: list[remote.Listed] = [(path, count, None, None) for path, count in unversioned]
    else:
        found = connect.call("list", uri, remote.listing)
        if not found and is_file(uri):
            raise InputError(uri, "is a file, not a directory", fix="name the directory it is in")
    entries = (
        Entry(safe_relative(path, uri), count, version, sha256)
        for path, count, version, sha256 in found
    )
    return tuple(sorted((e for e in entries if not is_hidden(e.path)), key=lambda e: e.path))


def glob(uri: str) -> tuple[str, ...]:
    """The URIs of the files that a pattern (`*`, `?`, `[…]`, `**`) matches, sorted.

    Local matches are absolute paths. Raises InputError for http(s), which cannot be listed.
    """
    if scheme(uri) in WEB:
        raise _no_listing(uri)
    pattern = str(local_path(uri).absolute()) if is_local(uri) else uri

    def match(filesystem: Any, path: str) -> list[str]:
        found: dict[str, dict[str, Any]] = filesystem.glob(path, detail=True)
        return [each for each, info in found.items() if info["type"] == "file"]

    head = uri.partition("://")[0] + "://" if "://" in uri else ""
    rooted = is_local(uri)
    return tuple(
        sorted(
            head + (each if rooted else each.lstrip("/"))
            for each in connect.call("list", pattern, match)
            if not is_hidden(each)
        )
    )


def exists(uri: str) -> bool:
    """Whether there is a file, or a directory or prefix with something in it."""
    if is_local(uri):
        path = local_path(uri)
        return retry.call("read", uri, lambda: local.exists(path))
    return connect.call("read", uri, _kind) is not None


def is_file(uri: str) -> bool:
    """Whether there is a file: neither nothing nor a directory."""
    if is_local(uri):
        path = local_path(uri)
        return retry.call("read", uri, path.is_file)
    return connect.call("read", uri, _kind) == "file"


def size(uri: str) -> int:
    """The bytes of a file. Raises InputError where there is none or the server will not say."""

    def ask(filesystem: Any, path: str) -> int | None:
        found = remote.info(filesystem, path)
        if found["type"] != "file":
            raise IsADirectoryError(f"{path} is a directory")
        return cast("int | None", found["size"])

    if is_local(uri):
        return retry.call("read", uri, lambda: local.size(local_path(uri)))
    count = connect.call("read", uri, ask)
    if count is None:
        raise InputError(uri, "its server does not tell sizes", fix="download it first")
    return count


def check_access(uri: str, mode: Literal["read", "write"]) -> None:
    """Proves early, before long work, that `uri` can be read or that files can be put below it.

    Reading needs something there, or a match where `uri` is a pattern. Writing puts a small
    object under the prefix, reads it and removes it again; a local directory is made.
    Raises InputError or StorageError with what to mend.
    """
    with retry.at_most(CHECK_RETRIES):
        if mode == "read":
            if not (glob(uri) if has_glob(uri) else exists(uri)):
                raise nothing_there(uri)
            return
        probe = join(uri, f"{PROBE}{secrets.token_hex(8)}")
        try:
            write_bytes(probe, b"probe")
            try:
                read_bytes(probe)  # a job reads what it stored, to go on from there
            finally:
                delete(probe)
        except JobError as error:
            problems = [replace(each, field=uri) for each in error.problems]
            raise type(error).from_problems(problems) from error


def _kind(filesystem: Any, path: str) -> str | None:
    """`file`, `directory`, or None where nothing is."""
    try:
        found = remote.info(filesystem, path)
    except FileNotFoundError as error:
        # Some libraries say "not found" for every failure and keep the real one as the cause.
        if failures.diagnose(error) != "missing":
            raise
        return None
    return str(found["type"])


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """The content of a file, or at most its first `limit` bytes. Raises InputError if missing."""
    if is_local(uri):
        return retry.call("read", uri, lambda: local.read(local_path(uri), limit))

    def fetch(filesystem: Any, path: str) -> bytes:
        if limit is None:
            return cast(bytes, filesystem.cat_file(path))
        count = remote.info(filesystem, path)["size"]
        end = limit if count is None else min(limit, count)
        # A range of an empty object is an error to S3.
        return cast(bytes, filesystem.cat_file(path, start=0, end=end)[:end]) if end else b""

    return connect.call("read", uri, fetch)


def read_text(uri: str) -> str:
    """The content of a UTF-8 file. Raises InputError if it is missing or is not UTF-8."""
    try:
        return read_bytes(uri).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(uri, f"is not UTF-8 text: {error}", fix="store it as UTF-8") from error


def open_read(uri: str) -> BinaryIO:
    """The file opened for reading, seekable; remote reads are tried again when they fail.

    Over http(s) it is downloaded first, to a temporary file that ends with the last reader.
    """
    if is_local(uri):
        return retry.call("read", uri, lambda: local_path(uri).open("rb"))
    if scheme(uri) == "memory":
        return io.BytesIO(read_bytes(uri))
    if scheme(uri) in WEB:  # its servers need not know ranges
        from tempfile import TemporaryDirectory  # 10 ms that other commands need not pay

        with TemporaryDirectory() as directory:
            path = Path(directory, "download")
            download(uri, path)
            return path.open("rb")
    return io.BufferedReader(remote.RemoteFile(uri), remote.BLOCK)


def download(uri: str, path: Path) -> None:
    """Copies a file to `path`, verified by its length; its directory is made.

    Raises InputError if it is missing, StorageError if the disk is full or transfers keep failing.
    """

    def copy() -> None:
        try:
            with local.whole_file(path) as unfinished:
                if is_local(uri):
                    shutil.copyfile(local_path(uri), unfinished)
                else:
                    remote.get(uri, unfinished)
        except OSError as error:
            if failures.diagnose(error) in ("full", "read-only"):  # here, not where it is from
                raise failures.explain(error, "write", str(path)) or error from error
            raise

    # What fails remotely is already an error of ours by then; what is left is the local disk.
    retry.call("read" if is_local(uri) else "write", uri if is_local(uri) else str(path), copy)


def write_bytes(uri: str, data: bytes, guard: Guard = UNGUARDED) -> None:
    """Stores `data` as a file, replacing what was there; its directory is made.

    Raises StorageError for read-only protocols, and what the guard raises.
    """
    refuse_read_only(uri)
    if is_local(uri):

        def write() -> None:
            with local.whole_file(local_path(uri), lambda: guard.writing(uri)) as unfinished:
                unfinished.write_bytes(data)

        retry.call("write", uri, write)
    else:
        remote.put(uri, data, guard)


def write_text(uri: str, text: str, guard: Guard = UNGUARDED) -> None:
    """Stores `text` as a UTF-8 file; see `write_bytes`."""
    write_bytes(uri, text.encode("utf-8"), guard)


def write_new(uri: str, data: bytes) -> bool:
    """Stores `data` as a file where there is none; False, and nothing done, where there is one.

    Of several at once one succeeds, on local disks and S3. Other stores are looked at before,
    and the last one wins. Raises StorageError for read-only protocols.
    """
    refuse_read_only(uri)
    if is_local(uri):
        return retry.call("write", uri, lambda: local.write_new(local_path(uri), data))
    return remote.put_new(uri, data)


def upload(path: Path, uri: str, guard: Guard = UNGUARDED) -> None:
    """Stores the local file `path`, verified by its length. Raises InputError if it is missing."""
    refuse_read_only(uri)
    retry.call("read", str(path), lambda: local.size(path))
    if is_local(uri):

        def copy() -> None:
            with local.whole_file(local_path(uri), lambda: guard.writing(uri)) as unfinished:
                shutil.copyfile(path, unfinished)

        retry.call("write", uri, copy)
    else:
        remote.put(uri, path, guard)


def delete(uri: str, guard: Guard = UNGUARDED) -> None:
    """Removes a file; nothing happens where there is none."""
    refuse_read_only(uri)
    if is_local(uri):

        def remove() -> None:
            with guard.writing(uri):
                local_path(uri).unlink(missing_ok=True)

        retry.call("delete", uri, remove)
    else:
        remote.delete(uri, guard)


def nothing_there(uri: str) -> MissingInputError:
    """The error for a source that is empty."""
    fix = failures.fix_missing(uri)
    return MissingInputError(uri, "cannot read, nothing is there", fix=fix)


def refuse_read_only(uri: str) -> None:
    """Raises StorageError for `hf://`, `http://` and `https://`."""
    if is_read_only(uri):
        raise StorageError(
            uri,
            f"cannot write, {scheme(uri)}:// is only ever read",
            fix="name a path, s3:// or another object store instead",
        )


def _no_listing(uri: str) -> InputError:
    return InputError(
        uri,
        f"cannot list, {scheme(uri)}:// has no listings",
        fix="name each file, or use a protocol with listings such as s3:// or hf://",
    )
