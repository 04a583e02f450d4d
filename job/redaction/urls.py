"""Finds secrets in URLs: user information before the host, and query parameters.

`secrets` parses a single URL, from the spec or the environment. `hide` finds URLs in any text; if
the end of a password is unclear, it hides more.
"""

import base64
import re
from collections.abc import Iterator
from urllib.parse import unquote

from job.redaction.kinds import KNOWN_FORMAT, is_secret, is_secret_parameter, looks_random

HIDDEN = "***"
_NAMED = re.compile(r"(?:\$\{\w+\}|\*\*\*)+")
"""Matches what redaction has inserted already."""

# Schemes in which a name without a password is not secret: a repository, a container, a login.
_NAMES_FIRST = frozenset(
    ("hf", "abfs", "abfss", "wasb", "wasbs", "adl", "ssh", "sftp", "git", "hdfs", "ftp", "smb")
)

# A password may contain `@`, `/` and quotes, so it extends to the last `@` before a space or a
# closing quote. A port number up to a slash is not a password.
_IN_WORD = r"(?:[^\s<>\"']|[\"'](?![\s,:)\]}]|$))"
_PASSWORD = rf"(?!\[)[^/\s:@\"'<>?#]*:(?!\d{{1,5}}(?:[/?#\s\"'<>]|$)){_IN_WORD}*(?=@)"
_ALONE = r"[^/\s:@\"'<>?#]+(?=@)"
_USER = re.compile(
    rf"(?P<scheme>[A-Za-z][\w+.-]{{0,15}})?://(?:(?P<password>{_PASSWORD})|(?P<alone>{_ALONE}))"
)
_PARAMETER = re.compile(r"([?&;#])([^=&;#?\s\"'<>/:@]{1,64})=([^&;\s\"'<>\\]+)")


def hide(text: str) -> str:
    """Replaces the secrets in URLs in `text` by `***`, except those already replaced."""
    if "://" in text and "@" in text:
        text = _USER.sub(_without_user, text)
    if "=" in text:
        text = _PARAMETER.sub(_without_value, text)
    return text


def _without_user(match: re.Match[str]) -> str:
    user, scheme = match["password"] or match["alone"], match["scheme"] or ""
    last = user.rpartition(":")[2] if match["password"] else user
    if _NAMED.fullmatch(last) and HIDDEN not in last:
        return match[0]
    if match["alone"] and not _is_secret_user(scheme, user):
        return match[0]
    return f"{scheme}://{HIDDEN}"


def _is_secret_user(scheme: str, user: str) -> bool:
    return (
        scheme.lower().rpartition("+")[2] not in _NAMES_FIRST
        or looks_random(user)
        or bool(KNOWN_FORMAT.search(user))
    )


def _without_value(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    if _NAMED.fullmatch(value):
        return match[0]
    if not _is_secret_value(name, value):
        # A fragment may have parameters too.
        return f"{mark}{name}={_PARAMETER.sub(_without_value, value)}"
    return f"{mark}{name}={HIDDEN}"


def _is_secret_value(name: str, value: str) -> bool:
    return is_secret_parameter(name) or is_secret(unquote(name), value)


def secrets(uri: str) -> Iterator[str]:
    """Yields the secrets in a URI or connection string, both as written and percent-decoded."""
    for secret in _secrets(uri):
        yield secret
        if "%" in secret:
            yield unquote(secret)


def _secrets(uri: str) -> Iterator[str]:
    before, _, rest = uri.partition("://")
    scheme = re.search(r"[A-Za-z][\w+.-]*$", before)
    if scheme and "@" in rest and not rest.startswith("["):
        user, colon, password = rest.rpartition("@")[0].partition(":")
        port = re.match(r"\d{1,5}(?:[/?#]|$)", password)
        if colon and "/" not in user and not port:
            yield password
            first = rest.partition("@")[0].partition(":")[2]  # the path may contain an `@` too
            yield first
            for each in (password, first):
                yield base64.b64encode(f"{unquote(user)}:{unquote(each)}".encode()).decode()
        alone = rest.partition("@")[0]
        if not any(c in alone for c in "/:?#") and _is_secret_user(scheme[0], alone):
            yield alone
    # The URI is the whole text, so a value extends to the end of its parameter.
    for part in re.split(r"[?&;#]", uri):
        name, equals, value = part.partition("=")
        if equals and len(name) <= 64 and _is_secret_value(name.strip(), value):
            yield value
