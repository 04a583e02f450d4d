"""Connections through fsspec, one for each protocol and set of environment variables."""

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

from job.errors import InputError
from job.storage.filesystem import FileSystem

F = TypeVar("F", bound=FileSystem)

CONNECT_SECONDS, READ_SECONDS = 10, 60
"""Timeouts of a connection and of each answer."""
_SETTINGS = ("AWS_", "HF_", "FSSPEC_", "GOOGLE_", "AZURE_")

_connections: dict[tuple[object, ...], FileSystem] = {}
_lock = threading.Lock()


def connection(protocol: str, scope: object, create: Callable[[], F]) -> F:
    """The connection for a protocol, created on first use and whenever settings change.

    `scope` separates connections that must not be shared, such as those of two threads.
    """
    settings = hash(frozenset(i for i in os.environ.items() if i[0].startswith(_SETTINGS)))
    key = (os.getpid(), protocol, settings, scope)
    with _lock:
        if key not in _connections:
            _connections[key] = create()
        return cast(F, _connections[key])


def forget(filesystem: FileSystem) -> None:
    """Drops a connection, so that the next call connects with current credentials."""
    with _lock:
        for key in [key for key, known in _connections.items() if known is filesystem]:
            del _connections[key]


def create(protocol: str, uri: str, options: Mapping[str, object]) -> FileSystem:
    """A new fsspec file system.

    Raises InputError if the protocol is unknown or its package is not installed.
    """
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        known = "is not known" if isinstance(error, ValueError) else "needs a package"
        raise InputError(
            uri,
            f"the protocol {protocol}:// {known}: {error}",
            fix=f"use one of {', '.join(installed())}, or install the package in the image",
        ) from error
    return cast(FileSystem, kind(skip_instance_cache=True, use_listings_cache=False, **options))


def installed() -> tuple[str, ...]:
    """The protocols that work in this environment, sorted."""
    from fsspec.registry import known_implementations, registry

    protocols = {"file", "http", "https", "memory", *registry}
    for protocol, known in known_implementations.items():
        package = known["class"].partition(".")[0]
        if package != "fsspec" and importlib.util.find_spec(package):
            protocols.add(protocol)
    return tuple(sorted(protocols - {"local"}))
