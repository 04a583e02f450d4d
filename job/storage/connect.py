"""Connections through fsspec: one for each protocol, made with finite timeouts and no retries."""

import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from job.errors import InputError
from job.storage import failures, retry
from job.storage.uri import scheme

T = TypeVar("T")

CONNECT_SECONDS, READ_SECONDS = 10, 60
"""How long a connection and each of its answers may take."""
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")  # as the hub's libraries read them
_SETTINGS = ("AWS_", "HF_", "FSSPEC_", "GOOGLE_", "AZURE_")

_connections: dict[tuple[object, ...], Any] = {}
_lock = threading.Lock()


def call(
    operation: failures.Operation,
    uri: str,
    function: Callable[[Any, str], T],
) -> T:
    """`function(filesystem, path)` under the retry policy; see `retry.call` for its errors."""

    def attempt() -> T:
        filesystem = connect(uri)
        path = filesystem._strip_protocol(uri)
        try:
            try:
                return function(filesystem, path)
            except Exception as error:
                if failures.is_unexplained(error):
                    _ask_why(filesystem, path)
                raise
        except Exception as error:
            # A listing that broke off halfway must not answer the next attempt from a cache.
            filesystem.invalidate_cache()
            if failures.diagnose(error) == "expired":
                _forget(filesystem)
            raise

    return retry.call(operation, uri, attempt)


def connect(uri: str) -> Any:
    """The fsspec file system for `uri`, made once for each protocol and set of settings.

    Raises InputError for a protocol that is unknown or whose package is not installed, and for the
    hub if a variable forbids to ask it.
    """
    protocol = scheme(uri)
    if (variable := hub_forbidden_by(uri)) is not None:
        raise offline(uri, variable)
    settings = hash(frozenset(i for i in os.environ.items() if i[0].startswith(_SETTINGS)))
    # The hub's listing cache is not safe between threads, so each thread has one of its own.
    thread = threading.get_ident() if protocol == "hf" else 0
    key = (os.getpid(), protocol, settings, thread)
    with _lock:
        if key not in _connections:
            _connections[key] = _connect(protocol, uri)
        return _connections[key]


def hub_forbidden_by(uri: str) -> str | None:
    """The variable that keeps the hub's libraries from asking for `uri`; None if none does."""
    if scheme(uri) != "hf":
        return None
    datasets = ("HF_DATASETS_OFFLINE",) if uri.startswith("hf://datasets/") else ()
    for variable in (*_OFFLINE, *datasets):
        if os.environ.get(variable, "").upper() in _TRUE:
            return variable
    return None


def offline(uri: str, variable: str) -> InputError:
    """The error for what is on the hub while a variable forbids to ask it: no retry can help."""
    return InputError(
        uri,
        f"the hub is not asked: {variable} is set",
        value=os.environ.get(variable),
        fix=f"unset {variable}, or name a copy in a folder or a bucket",
    )


def _ask_why(filesystem: Any, path: str) -> None:
    """Raises S3's reason for refusing a HEAD of `path`; returns where the store is another.

    The answer to a HEAD has no body, and the reason stands in the body: keys that expired look
    like keys that were never valid. A GET needs the same right and is told why not.
    """
    if hasattr(filesystem, "call_s3"):
        bucket, key, _ = filesystem.split_path(path)
        if key:
            filesystem.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
        else:
            filesystem.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        raise ConnectionError("refused one moment and granted the next")  # so it passes


def _forget(filesystem: Any) -> None:
    """Has the next call connect anew, with the keys that the environment gives then."""
    with _lock:
        for key in [key for key, known in _connections.items() if known is filesystem]:
            del _connections[key]


def _connect(protocol: str, uri: str) -> Any:
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
    common: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    match protocol:
        case "s3" | "s3a":
            region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
            filesystem = kind(
                **common,
                client_kwargs={"region_name": region} if region else {},
                config_kwargs={
                    "connect_timeout": CONNECT_SECONDS,
                    "read_timeout": READ_SECONDS,
                    "max_pool_connections": 32,
                    # One policy retries, `retry`; two would multiply.
                    "retries": {"total_max_attempts": 1},
                },
            )
            filesystem.retries = 1
            return filesystem
        case "hf":
            from huggingface_hub.utils import disable_progress_bars, logging

            # Bars and lines of its own would break the structured ones.
            disable_progress_bars()
            logging.set_verbosity_error()
            endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
            return kind(**common, endpoint=endpoint, token=os.environ.get("HF_TOKEN") or None)
        case "http" | "https":
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(
                total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
            )
            return kind(**common, client_kwargs={"timeout": timeout, "trust_env": True})
        case _:
            return kind(**common)


def installed() -> tuple[str, ...]:
    """The protocols that work in this environment, sorted."""
    from fsspec.registry import known_implementations, registry

    found = {"file", "http", "https", "memory", *registry}
    for protocol, known in known_implementations.items():
        package = known["class"].partition(".")[0]
        if package != "fsspec" and importlib.util.find_spec(package):
            found.add(protocol)
    return tuple(sorted(found - {"local"}))
