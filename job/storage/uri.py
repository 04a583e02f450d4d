"""Parses and joins URIs; opens no file or connection.

A URI is a bare path, `file://…`, or `PROTOCOL://…` for any protocol that fsspec knows. Bare paths
stay bare, so that messages show what the user wrote.
"""

from pathlib import Path

from job.errors import InputError

_WEB = ("http", "https")
"""Protocols whose `?` starts a query."""

INCOMPLETE_PREFIX, PROBE_PREFIX = ".writing-", ".write-probe-"
"""Name prefixes of incomplete files, and of files that test access; never listed."""
LEASE_LOCK_FILE = ".lease-lock"
"""The file that writers of a local output lock; never listed or removed."""


def scheme(uri: str) -> str:
    """The protocol in lower case; `file` for a local path."""
    head, separator, _ = uri.partition("://")
    protocol = head.lower() if separator else "file"
    return "file" if protocol == "local" else protocol


def is_local(uri: str) -> bool:
    """Whether a URI names a local file: a bare path or `file://`."""
    return scheme(uri) == "file"


def local_path(uri: str) -> Path:
    """The path of a local URI, with `~` expanded. Asserts that it is local."""
    assert is_local(uri), f"{uri} is not local"
    return Path(_rest(uri)).expanduser()


def resolved_path(uri: str) -> Path:
    """The path of a local URI with symbolic links resolved.

    Raises InputError for a link that leads back to itself.
    """
    try:
        return local_path(uri).resolve()
    except RuntimeError as error:  # from Python 3.13 on, whoever opens the path reports the link
        raise InputError(
            uri,
            "is or contains a symbolic link that leads back to itself",
            fix="remove the link, or name another path",
        ) from error


def has_glob(uri: str) -> bool:
    """Whether a URI is a pattern: contains `*`, `[`, or a `?` that does not start a query."""
    return any(mark in uri for mark in ("*[" if scheme(uri) in _WEB else "*[?"))


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it, separated by single slashes; empty parts are left out."""
    whole = uri
    for part in parts:
        below = part.strip("/")
        if below:
            above = _without_slash(whole)
            whole = above + ("" if above.endswith("/") else "/") + below
    return whole


def name(uri: str) -> str:
    """The last part: `s3://bucket/a/b.txt` and `https://host/a/b.txt?v=1` give `b.txt`."""
    rest = _rest(uri)
    if scheme(uri) in _WEB:
        rest = rest.partition("#")[0].partition("?")[0]
    return rest.rstrip("/").rpartition("/")[2]


def parent(uri: str) -> str:
    """The parent directory; a root (`s3://bucket`, `/`) is its own parent, and `a` is in `.`."""
    if is_local(uri) and "://" not in uri:
        return str(Path(uri).parent)
    head, _, rest = _without_slash(uri).partition("://")
    above, slash, _ = rest.rpartition("/")
    if not slash:
        return f"{head}://{rest}"
    return f"{head}://{above or '/'}"


def is_root(uri: str) -> bool:
    """Whether a URI names a whole bucket or file system, which is never deleted."""
    if is_local(uri):
        path = resolved_path(uri)
        return path == path.parent
    rest = _rest(uri).strip("/")
    return not rest or ("/" not in rest and scheme(uri) != "memory")


def safe_relative(path: str, uri: str) -> str:
    """`path`, if it stays below the directory that it is relative to.

    Raises InputError for a name that could write outside the directory of a download of `uri`:
    absolute, or with a `..`, an empty part or a backslash.
    """
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise InputError(
            uri,
            "contains a file whose name could escape the directory that it is copied to",
            value=repr(path),
            fix="rename or remove that file at its source",
        )
    return path


def is_hidden(path: str) -> bool:
    """Whether a file is incomplete, only tests access, or is a lock."""
    return path.rpartition("/")[2].startswith((INCOMPLETE_PREFIX, PROBE_PREFIX, LEASE_LOCK_FILE))


def _rest(uri: str) -> str:
    head, separator, rest = uri.partition("://")
    return rest if separator else head


def _without_slash(uri: str) -> str:
    """Strips trailing slashes, except those of a root (`/`, `memory://`)."""
    head, separator, rest = uri.partition("://")
    if separator:
        return f"{head}://{rest.rstrip('/') or ('/' if rest else '')}"
    return uri.rstrip("/") or ("/" if uri else "")
