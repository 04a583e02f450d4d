"""The table of backends: the class for each protocol, one class per file.

To add a store, write its class in a file here and add its protocols to the table.
"""

from typing import Any

from job.storage.backend import Backend
from job.storage.backends.hub import Hub
from job.storage.backends.local import LocalFiles
from job.storage.backends.memory import MemoryStore
from job.storage.backends.object_store import ObjectStore
from job.storage.backends.s3 import S3
from job.storage.backends.web import Web
from job.storage.uri import scheme

BACKENDS: dict[str, Backend[Any]] = {
    "file": LocalFiles(),
    "memory": MemoryStore(),
    "s3": (_s3 := S3()),
    "s3a": _s3,
    "hf": Hub(),
    "http": (_web := Web()),
    "https": _web,
    **dict.fromkeys(("gs", "gcs", "abfs", "abfss", "az", "oci", "oss"), ObjectStore()),
}
_ANY: Backend[Any] = Backend()


def backend_of(uri: str) -> Backend[Any]:
    """The backend of a URI; one that relies on fsspec alone for protocols not in the table."""
    return BACKENDS.get(scheme(uri), _ANY)


def is_read_only(uri: str) -> bool:
    """Whether nothing can be written there: `hf://`, `http://` and `https://`."""
    return backend_of(uri).read_only
