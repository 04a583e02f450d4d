"""A remote object as a seekable file."""

import io
from typing import TYPE_CHECKING

from job.storage import failures, retry
from job.storage.filesystem import OpenFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 4 * 2**20
"""Buffer size in bytes."""


class RemoteFile(io.RawIOBase):
    """An object open for reading; each read is retried on its own."""

    def __init__(self, uri: str, file: OpenFile, explainer: failures.Explainer) -> None:
        self._uri, self._file, self._explainer = uri, file, explainer
        self._position = 0
        self._size = int(file.size)

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

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")

        def fetch() -> bytes:
            self._file.seek(self._position)
            return self._file.read(min(len(view), max(self._size - self._position, 0)))

        if self._position >= self._size or not len(view):
            return 0
        data = retry.call("read", self._uri, fetch, self._explainer)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
