"""Types for the parts of fsspec's file systems that storage uses."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypedDict


class FileInfo(TypedDict, total=False):
    """Metadata of a path."""

    type: str
    """`file` or `directory`."""
    size: int | None
    """In bytes; None if the server does not say."""
    ETag: str
    """Version of the content, from S3."""
    blob_id: str
    """Version of the content, from the hub."""
    lfs: Mapping[str, str] | None
    """The hub's record of a large file, with its `sha256`."""


class OpenFile(Protocol):
    """A remote file open for reading."""

    size: int

    def seek(self, position: int) -> int: ...
    def read(self, count: int) -> bytes: ...
    def close(self) -> None: ...


class FileSystem(Protocol):
    """An fsspec file system; paths are without their protocol."""

    def _strip_protocol(self, uri: str) -> str: ...
    def invalidate_cache(self) -> None: ...
    def info(self, path: str) -> FileInfo: ...
    def exists(self, path: str) -> bool: ...
    def find(self, path: str, *, detail: Literal[True]) -> dict[str, FileInfo]: ...
    def glob(self, path: str, *, detail: Literal[True]) -> dict[str, FileInfo]: ...
    def open(self, path: str, mode: str, *, block_size: int) -> OpenFile: ...
    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def get_file(self, remote: str, local: str, /) -> None: ...
    def put_file(self, local: str, remote: str, /) -> None: ...
    def pipe_file(self, path: str, data: bytes, /) -> None: ...
    def cp_file(self, source: str, target: str, /) -> None: ...
    def mv(self, source: str, target: str, /) -> None: ...
    def rm_file(self, path: str) -> None: ...
    def makedirs(self, path: str, exist_ok: bool) -> None: ...


class S3Meta(Protocol):
    """A boto client's information about its server."""

    endpoint_url: str
    partition: str


class S3Client(Protocol):
    """The boto client of a connection."""

    meta: S3Meta


class S3FileSystem(FileSystem, Protocol):
    """s3fs."""

    s3: S3Client
    key: str | None
    retries: int

    def split_path(self, path: str) -> tuple[str, str, str | None]: ...
    def call_s3(self, method: str, **arguments: object) -> dict[str, Any]: ...


class ResolvedPath(Protocol):
    """A path on the hub, in a repository at a revision."""

    def unresolve(self) -> str: ...


class HubFileSystem(FileSystem, Protocol):
    """The Hugging Face hub's."""

    def resolve_path(self, path: str) -> ResolvedPath: ...
