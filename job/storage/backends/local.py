"""Bare paths and `file://`: this machine's file system."""

import shutil
from pathlib import Path
from typing import BinaryIO

from job.storage import local, retry
from job.storage.backend import Backend, Entry
from job.storage.failures import LOCAL, Operation
from job.storage.filesystem import FileSystem
from job.storage.uri import local_path, resolved_path
from job.storage.write_guard import UNGUARDED, Guard


class LocalFiles(Backend[FileSystem]):
    """Uses the file system directly; only globs go through fsspec."""

    def listing(self, uri: str) -> list[Entry]:
        root = local_path(uri)
        files = retry.call("list", uri, lambda: local.listing(root))
        return [Entry(path, size) for path, size in files]

    def glob(self, pattern: str) -> list[str]:
        matches = self.call("list", str(local_path(pattern).absolute()), self._match)
        return [self.uri_at(pattern, path) for path in matches]

    def uri_at(self, uri: str, path: str) -> str:
        head, separator, _ = uri.rpartition("://")
        return f"{head}{separator}{path}"

    def exists(self, uri: str) -> bool:
        path = local_path(uri)
        return retry.call("read", uri, lambda: local.exists(path))

    def is_file(self, uri: str) -> bool:
        return retry.call("read", uri, local_path(uri).is_file)

    def size(self, uri: str) -> int | None:
        return retry.call("read", uri, lambda: local.size(local_path(uri)))

    def read(self, uri: str, limit: int | None) -> bytes:
        return retry.call("read", uri, lambda: local.read(local_path(uri), limit))

    def open(self, uri: str) -> BinaryIO:
        return retry.call("read", uri, lambda: local_path(uri).open("rb"))

    def get(self, uri: str, path: Path) -> None:
        shutil.copyfile(local_path(uri), path)

    def put(self, uri: str, source: bytes | Path, guard: Guard = UNGUARDED) -> None:
        def store() -> None:
            with local.atomic_write(local_path(uri), lambda: guard.writing(uri)) as unfinished:
                if isinstance(source, bytes):
                    unfinished.write_bytes(source)
                else:
                    shutil.copyfile(source, unfinished)

        retry.call("write", uri, store)

    def link(self, uri: str, source: Path, guard: Guard = UNGUARDED) -> bool:
        def store() -> bool:
            return local.link(source, local_path(uri), lambda: guard.writing(uri))

        return retry.call("write", uri, store)

    def put_new(self, uri: str, data: bytes) -> bool:
        return retry.call("write", uri, lambda: local.write_new(local_path(uri), data))

    def delete(self, uri: str, guard: Guard = UNGUARDED) -> None:
        def remove() -> None:
            with guard.writing(uri):
                local_path(uri).unlink(missing_ok=True)

        retry.call("delete", uri, remove)

    def identity(self, uri: str) -> dict[str, object]:
        path = resolved_path(uri)
        existing = path
        while not existing.exists():
            existing = existing.parent
        return {"path": str(path), "device": existing.stat().st_dev}

    def fix_missing(self, uri: str) -> str:
        return LOCAL.fix_missing(uri)

    def fix_invalid(self, uri: str) -> str:
        return LOCAL.fix_invalid(uri)

    def fix_denied(self, uri: str, operation: Operation, reason: str) -> str:
        return LOCAL.fix_denied(uri, operation, reason)
