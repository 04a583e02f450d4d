"""`memory://`: objects of this process, for tests."""

import io
import os
from pathlib import Path
from typing import BinaryIO

from job.storage.backend import Backend
from job.storage.filesystem import FileSystem
from job.storage.write_guard import UNGUARDED, Guard


class MemoryStore(Backend[FileSystem]):
    """Writes and opens whole files: fsspec's are visible while incomplete, and share a position."""

    def open(self, uri: str) -> BinaryIO:
        return io.BytesIO(self.read(uri, None))

    def _get(self, filesystem: FileSystem, source: str, path: Path) -> None:
        path.write_bytes(filesystem.cat_file(source))

    def put(self, uri: str, source: bytes | Path, guard: Guard = UNGUARDED) -> None:
        def store(filesystem: FileSystem, path: str) -> None:
            data = source if isinstance(source, bytes) else source.read_bytes()
            with guard.writing(uri):
                filesystem.pipe_file(path, data)

        self.call("write", uri, store)

    def identity(self, uri: str) -> dict[str, object]:
        return {"path": self.key(uri), "process": [os.getpid(), _started()]}


def _started() -> str:
    """The start time of this process, since process ids are reused."""
    try:
        return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
