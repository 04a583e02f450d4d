"""Object stores that fsspec writes to in one request, or in parts that appear together."""

from job.storage.backend import Backend
from job.storage.filesystem import FileSystem


class ObjectStore(Backend[FileSystem]):
    """An object appears when it is complete, so nothing is renamed, which would copy it."""

    atomic_puts = True
