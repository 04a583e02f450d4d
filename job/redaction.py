"""What is written holds no secret, and no control character that somebody typed into data.

Known secrets are written by their names: what the environment holds under a name that tells of
one, and what the spec reads from such a variable. What no name gives away, a password in a URL or
the signature of one, is told by its place.
"""

import json
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|CONNECTION_STRING|"
    r"(API|ACCESS|ACCOUNT|PRIVATE|STORAGE|ENCRYPTION)_?KEY",
    re.I,
)
_SHORTEST_SECRET = 6  # anything shorter would redact half of every ordinary line
# Up to the last `@`, so that one in the password hides none of it.
_USERINFO = re.compile(r"(?<=://)[^/\s:@\"'<>]*:[^/\s\"'<>]*(?=@)")
_WEB_USERINFO = re.compile(r"(https?://)[^/\s:@\"'<>]+(?=@)", re.I)
_SIGNED = re.compile(
    r"([?&;](?:X-(?:Amz|Goog|OSS)-[\w-]+|(?:[\w-]*[_-])?(?:signature|sig|token|secret|password|"
    r"passwd|pwd|credential|key|AWSAccessKeyId))=)[^&;\s\"'<>\\]+",
    re.I,
)

_known: dict[str, str] = {}
"""Every spelling of every secret met so far, with the name to write for it."""


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a variable of this name is taken to hold a secret."""
    return bool(_SECRET_NAME.search(name))


def add_secret(name: str, value: str) -> None:
    """From now on `value` is written as `${name}` wherever it would appear."""
    if len(value) < _SHORTEST_SECRET or value in _known:
        return
    # As it is, in JSON and in Python's quotes, in a URL's path and in its query.
    spelled = (value, json.dumps(value)[1:-1], repr(value)[1:-1])
    for each in (*spelled, quote(value), quote(value, safe=""), quote_plus(value)):
        _known[each] = name


def redact(text: str) -> str:
    """`text` without secrets: known values by their names, passwords and signatures as `***`."""
    for name, value in os.environ.items():
        if is_secret_name(name):
            add_secret(name, value)
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, "${" + _known[value] + "}")
    if "://" in text:
        text = _WEB_USERINFO.sub(r"\1***", _USERINFO.sub("***", text))
    return _SIGNED.sub(r"\1***", text) if "=" in text else text


def redacted(value: Any) -> Any:
    """`value` with its texts redacted: in lists and mappings too, but for their keys."""
    match value:
        case str():
            return redact(value)
        case Mapping():
            return {key: redacted(inner) for key, inner in value.items()}
        case list() | tuple():
            return [redacted(inner) for inner in value]
        case _:
            return value


def printable(text: str, keep: str = "") -> str:
    """`text` with what would steer a terminal or end a line written out: `\\x1b`, `\\u2028`."""
    if text.isprintable():
        return text
    return "".join(
        each if each in keep or each.isprintable() else each.encode("unicode_escape").decode()
        for each in text
    )


def print_traceback(error: BaseException) -> None:
    """What Python would print of the error and of those that caused it."""
    sys.stderr.write(redact("".join(traceback.format_exception(error))))


def install() -> None:
    """Has Python's own words redacted too: tracebacks that nobody catches, and warnings."""

    def uncaught(kind: type[BaseException], error: BaseException, _: object) -> None:
        if not issubclass(kind, SystemExit):
            print_traceback(error)

    def in_thread(told: threading.ExceptHookArgs) -> None:
        if told.exc_value is not None:
            uncaught(told.exc_type, told.exc_value, told.exc_traceback)

    plain = warnings.formatwarning

    def warned(*what: Any, **more: Any) -> str:
        return redact(plain(*what, **more))

    sys.excepthook, threading.excepthook = uncaught, in_thread
    warnings.formatwarning = warned
