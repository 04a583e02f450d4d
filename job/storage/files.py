"""Single files and listings, by URI."""

import json
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from job.errors import InputError, JobError, MissingInputError, StorageError
from job.storage import failures, local, retry
from job.storage.backend import Entry
from job.storage.backends import backend_of, is_read_only
from job.storage.uri import PROBE_PREFIX, has_glob, is_hidden, is_local, join, safe_relative, scheme
from job.storage.write_guard import UNGUARDED, Guard

LINKED_FROM = 2**20
"""Bytes; smaller files are copied, which takes less care of who may read them."""
CHECK_RETRIES = 3
"""Retries of `check_access`: few, so that a wrong endpoint is reported within seconds."""


def list_files(uri: str) -> tuple[Entry, ...]:
    """Every file below a directory or prefix, sorted by path; empty if there is none.

    Raises InputError for a missing bucket or repository, for a `uri` that is itself a file, and
    for names that could leave the directory that they are copied to.
    """
    _require_listings(uri)
    entries = backend_of(uri).listing(uri)
    if not entries and not is_local(uri) and is_file(uri):
        raise InputError(uri, "is a file, not a directory", fix="name the directory it is in")
    for entry in entries:
        safe_relative(entry.path, uri)
    visible = (entry for entry in entries if not is_hidden(entry.path))
    return tuple(sorted(visible, key=lambda entry: entry.path))


def glob(uri: str) -> tuple[str, ...]:
    """The URIs of the files that a pattern (`*`, `?`, `[…]`, `**`) matches, sorted.

    Local matches are absolute paths. Raises InputError for http(s), which has no listings.
    """
    _require_listings(uri)
    return tuple(sorted(match for match in backend_of(uri).glob(uri) if not is_hidden(match)))


def exists(uri: str) -> bool:
    """Whether there is a file, or a non-empty directory or prefix."""
    return backend_of(uri).exists(uri)


def is_file(uri: str) -> bool:
    """Whether there is a file, rather than a directory or nothing."""
    return backend_of(uri).is_file(uri)


def size(uri: str) -> int:
    """The size of a file in bytes. Raises InputError if it is missing or the size unknown."""
    count = backend_of(uri).size(uri)
    if count is None:
        raise InputError(uri, "its server reports no sizes", fix="download it first")
    return count


def identity(uri: str) -> dict[str, object]:
    """Identifies the location of a URI, as JSON values without secrets.

    Equal for all spellings of one location; different for equal spellings of different locations:
    `outputs/latex` in two checkouts, or `s3://bucket/run` on two servers. Local paths are resolved
    through links, with their device; stores are named by server and, where it tells buckets apart,
    account. Raises InputError for an unknown protocol; sends no request to the store.
    """
    return backend_of(uri).identity(uri)


def check_access(uri: str, mode: Literal["read", "write"]) -> None:
    """Checks, before long work, that `uri` can be read or that files can be stored below it.

    To be readable, it must exist, or match something if it is a pattern. To test writing, a small
    object is stored under it, read and removed; a local directory is created.
    Raises InputError or StorageError.
    """
    with retry.at_most(CHECK_RETRIES):
        if mode == "read":
            if not (glob(uri) if has_glob(uri) else exists(uri)):
                raise missing_error(uri)
            return
        probe = join(uri, f"{PROBE_PREFIX}{secrets.token_hex(8)}")
        try:
            write_bytes(probe, b"probe")
            try:
                read_bytes(probe)  # resuming a job requires reading
            finally:
                delete(probe)
        except JobError as error:
            problems = [replace(each, field=uri) for each in error.problems]
            raise type(error).from_problems(problems) from error


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """The content of a file, or at most its first `limit` bytes. Raises InputError if missing."""
    return backend_of(uri).read(uri, limit)


def read_text(uri: str) -> str:
    """The content of a UTF-8 file. Raises InputError if it is missing or is not UTF-8."""
    try:
        return read_bytes(uri).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(uri, f"is not UTF-8 text: {error}", fix="store it as UTF-8") from error


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 - any JSON
    """The value of stored JSON. Raises ValueError if it is damaged, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def open_read(uri: str) -> BinaryIO:
    """The file open for reading, seekable; failed remote reads are retried.

    Over http(s) it is downloaded first, to a temporary file that is deleted when closed.
    """
    return backend_of(uri).open(uri)


def download(uri: str, path: Path) -> None:
    """Copies a file to `path`, checked by its length; its directory is created.

    Raises InputError if it is missing, StorageError if the disk is full or transfers keep failing.
    """

    def copy() -> None:
        try:
            with local.atomic_write(path) as unfinished:
                backend_of(uri).get(uri, unfinished)
        except OSError as error:
            if failures.LOCAL.diagnose(error) in (
                "full",
                "read-only",
            ):  # the target, not the source
                raise failures.LOCAL.explain(error, "write", str(path)) or error from error
            raise

    # Remote failures are JobErrors by then; what is left concerns the local disk.
    retry.call("read" if is_local(uri) else "write", uri if is_local(uri) else str(path), copy)


def write_bytes(uri: str, data: bytes, guard: Guard = UNGUARDED) -> None:
    """Stores `data` as a file, replacing any other; its directory is created.

    Raises StorageError for read-only protocols, and what the guard raises.
    """
    refuse_read_only(uri)
    backend_of(uri).put(uri, data, guard)


def write_text(uri: str, text: str, guard: Guard = UNGUARDED) -> None:
    """Stores `text` as a UTF-8 file; see `write_bytes`."""
    write_bytes(uri, text.encode("utf-8"), guard)


def write_new(uri: str, data: bytes) -> bool:
    """Stores `data` as a file unless one exists; returns whether it did.

    On local disks and S3, one of several concurrent writers succeeds. Other stores are checked
    first, and the last writer wins. Raises StorageError for read-only protocols.
    """
    refuse_read_only(uri)
    return backend_of(uri).put_new(uri, data)


def upload(path: Path, uri: str, guard: Guard = UNGUARDED, *, final: bool = False) -> None:
    """Stores the local file `path`, checked by its length. Raises InputError if it is missing.

    `final` promises that nobody changes the file any more, so that a large one can be stored
    without a second copy: at a local `uri` on the same disk, by a hard link.
    """
    refuse_read_only(uri)
    size = retry.call("read", str(path), lambda: local.size(path))
    if final and size >= LINKED_FROM and backend_of(uri).link(uri, path, guard):
        return
    backend_of(uri).put(uri, path, guard)


def delete(uri: str, guard: Guard = UNGUARDED) -> None:
    """Deletes a file if it exists."""
    refuse_read_only(uri)
    backend_of(uri).delete(uri, guard)


def missing_error(uri: str) -> MissingInputError:
    """The error for a source with no files."""
    fix = backend_of(uri).fix_missing(uri)
    return MissingInputError(uri, "cannot read: not found", fix=fix)


def refuse_read_only(uri: str) -> None:
    """Raises StorageError for `hf://`, `http://` and `https://`."""
    if is_read_only(uri):
        raise StorageError(
            uri,
            f"cannot write: {scheme(uri)}:// is read-only",
            fix="name a path, s3:// or another object store instead",
        )


def _require_listings(uri: str) -> None:
    if not backend_of(uri).has_listings:
        raise InputError(
            uri,
            f"cannot list: {scheme(uri)}:// has no listings",
            fix="name each file, or use a protocol with listings such as s3:// or hf://",
        )
