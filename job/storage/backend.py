"""Single objects in stores and on hubs: look at, list, get, put, copy and delete them."""

import io
import secrets
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from job.storage import failures, retry, s3
from job.storage.connect import call
from job.storage.uri import WRITING, scheme
from job.storage.write_guard import UNGUARDED, Guard

BLOCK = 4 * 2**20
"""Bytes read ahead in an open file."""
_PUTS_WHOLE = frozenset({"memory", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"})


def info(filesystem: Any, path: str) -> dict[str, Any]:
    """`type` (`file` or `directory`) and `size` of what is at `path`; FileNotFoundError if none."""
    found: dict[str, Any] = filesystem.info(path)
    return found


Listed = tuple[str, int, str | None, str | None]
"""A file's name, size, version and SHA-256."""


def listing(filesystem: Any, path: str) -> list[Listed]:
    """Every file below `path`, by its name relative to that. Not sorted."""
    if hasattr(filesystem, "resolve_path"):  # the hub names what it lists by a revision
        filesystem.invalidate_cache()
        path = filesystem.resolve_path(path).unresolve()
    prefix = path.rstrip("/") + "/"
    found: dict[str, dict[str, Any]] = filesystem.find(path, detail=True)
    return [
        (
            name.removeprefix(prefix),
            each["size"],
            each.get("ETag") or each.get("blob_id"),
            (each.get("lfs") or {}).get("sha256"),
        )
        for name, each in found.items()
        # A name that ends in a slash marks a directory for tools that want to see one.
        if name.startswith(prefix) and not name.endswith("/") and each["type"] == "file"
    ]


def get(uri: str, path: Path) -> None:
    """Copies an object to the local file `path`, which holds it whole or the call fails."""

    def fetch(filesystem: Any, source: str) -> None:
        found = info(filesystem, source)
        if found["type"] == "directory":
            raise IsADirectoryError(f"{source} is a directory")
        if scheme(uri) == "memory":  # its open files share one position
            path.write_bytes(filesystem.cat_file(source))
        else:
            try:
                filesystem.get_file(source, str(path))
            except OSError as error:
                if failures.diagnose(error) in ("full", "read-only"):  # here, not where it is from
                    raise failures.explain(error, "write", str(path)) or error from error
                raise
        arrived = path.stat().st_size
        if found["size"] is not None and arrived != found["size"]:
            raise failures.Truncated(
                f"{arrived} bytes arrived where {found['size']} were announced"
            )

    call("read", uri, fetch)


def copy(source: str, target: str, length: int) -> None:
    """Copies an object within one store, on its server. For errors see `retry.call`."""

    def move(filesystem: Any, path: str) -> None:
        destination = filesystem._strip_protocol(target)
        filesystem.cp_file(path, destination)
        s3.check_length(filesystem, destination, length)

    call("copy", source, move)


def delete(uri: str, guard: Guard = UNGUARDED) -> None:
    """Removes an object; nothing happens where there is none."""
    if scheme(uri) in ("s3", "s3a") and guard.conditions.deletes:
        s3.delete_unchanged(uri, guard)
        return

    def remove(filesystem: Any, path: str) -> None:
        try:
            with guard.writing(uri):
                filesystem.rm_file(path)
        except FileNotFoundError as error:
            if failures.diagnose(error) != "missing":
                raise

    call("delete", uri, remove)


def put(uri: str, source: bytes | Path, guard: Guard = UNGUARDED) -> None:
    """Stores bytes or a local file as one object, visible when it is whole.

    Raises StorageError when the object's length is not that of the source.
    """
    protocol = scheme(uri)
    if protocol in ("s3", "s3a"):
        s3.put(uri, source, guard)
        return

    def store(filesystem: Any, path: str) -> None:
        if protocol == "memory":  # it shows a file from its first byte on
            data = source if isinstance(source, bytes) else source.read_bytes()
            with guard.writing(uri):
                filesystem.pipe_file(path, data)
            return
        direct = protocol in _PUTS_WHOLE
        parent, _, _ = path.rpartition("/")
        target = path if direct else f"{parent}/{WRITING}{secrets.token_hex(8)}"
        if not direct:
            filesystem.makedirs(parent, exist_ok=True)
        guard.ensure()
        try:
            with guard.writing(uri) if direct else nullcontext():
                if isinstance(source, bytes):
                    filesystem.pipe_file(target, source)
                else:
                    filesystem.put_file(str(source), target)
            if not direct:
                with guard.writing(uri):
                    filesystem.mv(target, path)
        except BaseException:
            if not direct:
                with suppress(Exception):
                    filesystem.rm_file(target)
            raise
        s3.check_length(filesystem, path, s3.length_of(source))

    call("write", uri, store)


def put_new(uri: str, data: bytes) -> bool:
    """Stores an object where there is none; tells whether it did."""
    if scheme(uri) in ("s3", "s3a"):
        return s3.put_new(uri, data)
    if call("read", uri, lambda filesystem, path: filesystem.exists(path)):
        return False
    put(uri, data)
    return True


class RemoteFile(io.RawIOBase):
    """An object open for reading anywhere in it; each read is tried again when it fails."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._position = 0
        self._file = call("read", uri, self._open)
        self._size = int(self._file.size)

    @staticmethod
    def _open(filesystem: Any, path: str) -> Any:
        return filesystem.open(path, "rb", block_size=BLOCK)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        def fetch() -> bytes:
            self._file.seek(self._position)
            data: bytes = self._file.read(min(len(buffer), max(self._size - self._position, 0)))
            return data

        if self._position >= self._size or not len(buffer):
            return 0
        data = retry.call("read", self._uri, fetch)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
