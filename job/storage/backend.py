"""The storage operations, implemented with fsspec.

`Backend` serves any protocol that fsspec knows. Stores that differ subclass it, in a module of
`backends`, and list their protocols in the table there.
"""

import io
import os
import secrets
from collections.abc import Callable, Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ClassVar, Generic, TypeVar, cast

from job.storage import connect, failures, retry
from job.storage.filesystem import FileInfo, FileSystem
from job.storage.remote_file import BLOCK, RemoteFile
from job.storage.uri import INCOMPLETE_PREFIX, scheme
from job.storage.write_guard import UNGUARDED, Conditions, Guard

F = TypeVar("F", bound=FileSystem)
T = TypeVar("T")

_SETTINGS = ("FSSPEC_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR_", "OSS_")
_SECRET = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL", "SAS", "CONNECTION_STRING")


@dataclass(frozen=True)
class Entry:
    """One file of a listing."""

    path: str
    """Relative to the listed root, with `/` between its parts."""
    size: int
    """In bytes."""
    version: str | None = field(default=None, compare=False)
    """The store's version of the content (an ETag, a blob id), if any."""
    sha256: str | None = field(default=None, compare=False)
    """Of the content, if the store knows it, as the hub does for large files."""


class Backend(failures.Explainer, Generic[F]):
    """Reads and writes through the fsspec file system of a URI's protocol, under `retry`.

    Every method raises what `retry.call` raises.
    """

    read_only: ClassVar[bool] = False
    has_listings: ClassVar[bool] = True
    atomic_puts: ClassVar[bool] = False
    """Whether an object becomes visible only when it is complete. Otherwise it is written under
    another name and renamed."""
    copies: ClassVar[bool] = True
    """Whether the store can copy objects on its server."""

    # --- connecting -------------------------------------------------------------------------

    def options(self, uri: str) -> dict[str, object]:
        """Arguments for the fsspec class: finite timeouts, and a single attempt per call."""
        return {}

    def connection_scope(self, uri: str) -> object:
        """A connection is shared only within this scope; None is the process."""
        return None

    def connect(self, uri: str) -> F:
        """The file system, connected on first use.

        Raises InputError if the protocol is unknown or its package is not installed.
        """
        protocol = scheme(uri)
        return connect.connection(
            protocol, self.connection_scope(uri), lambda: self.create(protocol, uri)
        )

    def create(self, protocol: str, uri: str) -> F:
        """A new file system."""
        return cast(F, connect.create(protocol, uri, self.options(uri)))

    def raise_reason(self, filesystem: F, path: str) -> None:
        """Raises an error with the store's reason for refusing `path`, if it can be determined."""

    def call(self, operation: failures.Operation, uri: str, function: Callable[[F, str], T]) -> T:
        """`function(filesystem, path)` under the retry policy."""

        def attempt() -> T:
            filesystem = self.connect(uri)
            path = filesystem._strip_protocol(uri)
            try:
                try:
                    return function(filesystem, path)
                except Exception as error:
                    if failures.is_unexplained(error):
                        self.raise_reason(filesystem, path)
                    raise
            except Exception as error:
                # The next attempt must not use a cached, incomplete listing.
                filesystem.invalidate_cache()
                if self.diagnose(error) == "expired":
                    connect.forget(filesystem)
                raise

        return retry.call(operation, uri, attempt, self)

    # --- reading ----------------------------------------------------------------------------

    def listing(self, uri: str) -> list[Entry]:
        """Every file below `uri`, in no order; empty if there is none."""
        return self.call("list", uri, self._list)

    def _list(self, filesystem: F, path: str) -> list[Entry]:
        prefix = path.rstrip("/") + "/"
        return [
            Entry(
                name.removeprefix(prefix),
                cast(int, info["size"]),
                info.get("ETag") or info.get("blob_id"),
                (info.get("lfs") or {}).get("sha256"),
            )
            for name, info in filesystem.find(path, detail=True).items()
            # Some tools mark directories by empty objects whose names end in a slash.
            if name.startswith(prefix) and not name.endswith("/") and info["type"] == "file"
        ]

    def glob(self, pattern: str) -> list[str]:
        """The URIs of the files that a pattern matches, in no order."""
        matches = self.call("list", pattern, self._match)
        return [self.uri_at(pattern, path) for path in matches]

    def _match(self, filesystem: F, path: str) -> list[str]:
        infos = filesystem.glob(path, detail=True)
        return [name for name, info in infos.items() if info["type"] == "file"]

    def uri_at(self, uri: str, path: str) -> str:
        """The URI of another path in the store of `uri`."""
        return f"{uri.partition('://')[0]}://{path.lstrip('/')}"

    def info(self, uri: str) -> FileInfo | None:
        """Metadata of a file, directory or prefix; None if it does not exist."""

        def ask(filesystem: F, path: str) -> FileInfo | None:
            try:
                return filesystem.info(path)
            except Exception as error:
                # FileNotFoundError is not enough: some libraries raise it for every failure.
                if self.diagnose(error) != "missing":
                    raise
                return None

        return self.call("read", uri, ask)

    def exists(self, uri: str) -> bool:
        """Whether there is a file, or a non-empty directory or prefix."""
        return self.info(uri) is not None

    def is_file(self, uri: str) -> bool:
        info = self.info(uri)
        return info is not None and info["type"] == "file"

    def size(self, uri: str) -> int | None:
        """The size of a file in bytes; None if the server does not report it."""
        return self.call("read", uri, lambda filesystem, path: _file_info(filesystem, path)["size"])

    def read(self, uri: str, limit: int | None) -> bytes:
        """The content of a file, or at most its first `limit` bytes."""

        def fetch(filesystem: F, path: str) -> bytes:
            if limit is None:
                return filesystem.cat_file(path)
            size = filesystem.info(path)["size"]
            end = limit if size is None else min(limit, size)
            # S3 refuses a range of an empty object.
            return filesystem.cat_file(path, start=0, end=end)[:end] if end else b""

        return self.call("read", uri, fetch)

    def open(self, uri: str) -> BinaryIO:
        """Opens a seekable file for reading."""
        file = self.call(
            "read", uri, lambda filesystem, path: filesystem.open(path, "rb", block_size=BLOCK)
        )
        return io.BufferedReader(RemoteFile(uri, file, self), BLOCK)

    def get(self, uri: str, path: Path) -> None:
        """Downloads a file to the local `path` and checks its length."""

        def fetch(filesystem: F, source: str) -> None:
            size = _file_info(filesystem, source)["size"]
            self._get(filesystem, source, path)
            received = path.stat().st_size
            if size is not None and received != size:
                raise failures.Truncated(f"{received} of {size} bytes arrived")

        self.call("read", uri, fetch)

    def _get(self, filesystem: F, source: str, path: Path) -> None:
        try:
            filesystem.get_file(source, str(path))
        except OSError as error:
            if self.diagnose(error) in ("full", "read-only"):  # the local disk, not the source
                raise failures.LOCAL.explain(error, "write", str(path)) or error from error
            raise

    # --- writing ----------------------------------------------------------------------------

    def put(self, uri: str, source: bytes | Path, guard: Guard = UNGUARDED) -> None:
        """Stores bytes or a local file as one object, visible only when complete.

        Checks its length. Raises what the guard raises.
        """

        def store(filesystem: F, path: str) -> None:
            parent, _, _ = path.rpartition("/")
            target = (
                path if self.atomic_puts else f"{parent}/{INCOMPLETE_PREFIX}{secrets.token_hex(8)}"
            )
            if not self.atomic_puts:
                filesystem.makedirs(parent, exist_ok=True)
            guard.ensure()
            try:
                with guard.writing(uri) if self.atomic_puts else nullcontext():
                    if isinstance(source, bytes):
                        filesystem.pipe_file(target, source)
                    else:
                        filesystem.put_file(str(source), target)
                if not self.atomic_puts:
                    with guard.writing(uri):
                        filesystem.mv(target, path)
            except BaseException:
                if not self.atomic_puts:
                    with suppress(Exception):
                        filesystem.rm_file(target)
                raise
            check_length(filesystem, path, length_of(source))

        self.call("write", uri, store)

    def link(self, uri: str, source: Path, guard: Guard = UNGUARDED) -> bool:
        """Stores a local file without copying it, if the store can; returns whether it did."""
        return False

    def put_new(self, uri: str, data: bytes) -> bool:
        """Stores an object unless one exists; returns whether it did."""
        if self.call("read", uri, lambda filesystem, path: filesystem.exists(path)):
            return False
        self.put(uri, data)
        return True

    def copy(self, source: str, target: str, size: int) -> None:
        """Copies an object within the store, on its server, and checks its length."""

        def copy(filesystem: F, path: str) -> None:
            destination = filesystem._strip_protocol(target)
            filesystem.cp_file(path, destination)
            check_length(filesystem, destination, size)

        self.call("copy", source, copy)

    def delete(self, uri: str, guard: Guard = UNGUARDED) -> None:
        """Deletes an object if it exists."""

        def remove(filesystem: F, path: str) -> None:
            try:
                with guard.writing(uri):
                    filesystem.rm_file(path)
            except Exception as error:
                if self.diagnose(error) != "missing":
                    raise

        self.call("delete", uri, remove)

    def conditions(self, uri: str) -> Conditions:
        """Which conditional requests the store honors below `uri`."""
        return Conditions()

    def delete_unfinished(self, uri: str, below: Collection[str], guard: Guard) -> int:
        """Deletes unfinished uploads to the folders `below` `uri`; returns how many."""
        return 0

    # --- identity ---------------------------------------------------------------------------

    def identity(self, uri: str) -> dict[str, object]:
        """JSON values that are equal if and only if two URIs name the same location."""
        settings = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_SETTINGS) and not any(word in name for word in _SECRET)
        }
        return {"path": self.key(uri), "protocol": scheme(uri), "settings": settings}

    def key(self, uri: str) -> str:
        """The path in the store, without slashes around it."""
        return str(self.connect(uri)._strip_protocol(uri)).strip("/")


def _file_info(filesystem: FileSystem, path: str) -> FileInfo:
    info = filesystem.info(path)
    if info["type"] == "directory":
        raise IsADirectoryError(f"{path} is a directory")
    return info


def check_length(filesystem: FileSystem, path: str, length: int) -> None:
    """Raises Truncated if the object at `path` is not `length` bytes long."""
    stored = filesystem.info(path)["size"]
    if stored != length:
        raise failures.Truncated(f"{stored} of {length} bytes were stored")


def length_of(source: bytes | Path) -> int:
    """The size of an upload in bytes."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size
