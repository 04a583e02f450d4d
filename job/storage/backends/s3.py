"""What a URI really names: the same for all its spellings, another for another server's.

`outputs/latex` is another folder in each checkout, and `s3://bucket/run` other objects on each
server, so what is kept by an output's URI alone would be mixed.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from job.storage.connect import call, connect
from job.storage.uri import is_local, local_path, scheme

AWS = (".amazonaws.com", ".amazonaws.com.cn")
"""Servers with one namespace of buckets, whoever asks."""
_SETTINGS = ("FSSPEC_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR_", "OSS_")
_SECRET = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL", "SAS", "CONNECTION_STRING")
_STATIC = ("env", "explicit", "shared-credentials-file", "config-file")


def identity(uri: str) -> dict[str, Any]:
    """Values that JSON can write, and no secret among them.

    Of a local path where it leads, through links, and the device it is on; of a store the server,
    the account as far as it tells buckets apart, and the key. Raises InputError for an unknown
    protocol; the store itself is not asked.
    """
    if is_local(uri):
        path = local_path(uri).resolve()
        there = path
        while not there.exists():
            there = there.parent
        return {"path": str(path), "device": there.stat().st_dev}
    filesystem = connect(uri)
    found = {"path": str(filesystem._strip_protocol(uri)).strip("/")}
    match scheme(uri):
        case "memory":  # this process's own
            return {**found, "process": [os.getpid(), _started()]}
        case "s3" | "s3a":
            return {**found, **call("read", uri, lambda connected, _: _s3(connected))}
        case protocol:
            settings = {
                name: text
                for name, text in os.environ.items()
                if name.startswith(_SETTINGS) and not any(word in name for word in _SECRET)
            }
            return {**found, "protocol": protocol, "settings": settings}


def _s3(filesystem: Any) -> dict[str, str]:
    """The server, as the connection has worked it out from environment, profile and settings."""
    meta = filesystem.s3.meta
    host = urlsplit(meta.endpoint_url).hostname or ""
    if host.endswith(AWS):
        return {"server": str(meta.partition)}
    return {"server": meta.endpoint_url.rstrip("/"), "account": _account(filesystem)}


def _account(filesystem: Any) -> str:
    """Which account's buckets are meant, by a digest of the name of its key.

    Roles get other keys every hour, so they count by their own name.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import get_session

    name = filesystem.key or ""
    with suppress(BotoCoreError, ClientError):
        if not name and (found := get_session().get_credentials()) is not None:
            static = found.method in _STATIC
            name = found.access_key if static else os.environ.get("AWS_ROLE_ARN", found.method)
    return hashlib.sha256(str(name).encode()).hexdigest()[:16]


def _started() -> str:
    try:
        return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
