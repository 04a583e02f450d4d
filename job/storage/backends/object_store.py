"""Object stores to which fsspec writes atomically: in one request, or a multipart upload."""

from job.storage.backend import Backend
from job.storage.filesystem import FileSystem


class ObjectStore(Backend[FileSystem]):
    """Writes objects directly; a rename would copy them."""

    atomic_puts = True
