"""`http://` and `https://`: single files, read only."""

from pathlib import Path
from typing import BinaryIO

from job.storage import connect
from job.storage.backend import Backend
from job.storage.filesystem import FileSystem


class Web(Backend[FileSystem]):
    """Plain web servers, which may not support listings or ranges."""

    read_only = True
    has_listings = False

    def options(self, uri: str) -> dict[str, object]:
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(
            total=None, sock_connect=connect.CONNECT_SECONDS, sock_read=connect.READ_SECONDS
        )
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}

    def open(self, uri: str) -> BinaryIO:
        """Downloads to a temporary file, which is deleted when closed."""
        from tempfile import TemporaryDirectory  # 10 ms that other commands need not pay

        with TemporaryDirectory() as directory:
            path = Path(directory, "download")
            self.get(uri, path)
            return path.open("rb")
