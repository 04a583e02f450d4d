"""What is written holds no secret, and no control character that somebody typed into data.

It may import nothing of the job, and everything may import it. `kinds` says what a secret is,
`urls` what URLs hold of them, `terminal` what steers one. Secrets of the environment, and those
that the spec reads from it, are written by their variables' names; others, which are told by their
form or place, as `***`.
"""

import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from job.redaction import spellings, urls
from job.redaction.kinds import (
    KNOWN_FORM,
    MARKS,
    is_secret,
    is_secret_name,
    is_secret_where_read,
    may_hold_known_form,
)
from job.redaction.terminal import STEERING, json_text, printable, texts_in

__all__ = [
    "STEERING",
    "Screen",
    "add_secret",
    "add_secrets_of",
    "adopt",
    "as_json",
    "holds_secret",
    "install",
    "is_secret",
    "is_secret_name",
    "is_secret_where_read",
    "known",
    "print_traceback",
    "printable",
    "redact",
    "redacted",
    "shown",
]

_SHORTEST_SECRET = 6  # anything shorter would redact half of every ordinary line
_WORD = re.compile(r"\S+")

_known: dict[str, str] = {}
"""Every spelling of every secret met so far, with what to write for it."""


class _State:
    """What was made of the environment and of the known secrets, while both are the same."""

    environ: Any = None
    secrets: dict[str, str] | None = None
    count = -1
    pattern: re.Pattern[str] | None = None


def add_secret(name: str, value: str) -> None:
    """From now on `value` is written as `${name}` wherever it would appear."""
    _add(value, "${" + name + "}")
    # Parts of it are used alone: the key in a connection string, a line of a PEM block.
    for part in (*urls.secrets(value), *spellings.parts(value)):
        _add(part, "${" + name + "}")


def add_secrets_of(uri: str) -> None:
    """From now on the passwords and signatures in `uri` are written as `***` wherever they are."""
    if "://" in uri or ("=" in uri and ";" in uri):
        for secret in urls.secrets(uri):
            _add(secret, urls.HIDDEN)


def holds_secret(name: str, value: str) -> bool:
    """Whether what a spec reads of a variable is a secret, or a URI that holds one."""
    return is_secret_where_read(name, value) or next(urls.secrets(value), None) is not None


def known() -> dict[str, str]:
    """The secrets met so far, for `adopt` in a process that this one starts."""
    return dict(_known)


def adopt(secrets: Mapping[str, str]) -> None:
    """Knows the secrets of another process."""
    _known.update(secrets)


def _add(value: str, instead: str) -> None:
    for text in {value, value.strip()}:
        if len(text) >= _SHORTEST_SECRET and text not in _known and not _is_hidden(text):
            for spelled in spellings.spellings(text):
                _known.setdefault(spelled, instead)


def _is_hidden(text: str) -> bool:
    return re.fullmatch(r"\$\{\w+\}|\*+", text) is not None


def redact(text: str) -> str:
    """`text` without secrets: known ones by their names, what looks like one as `***`."""
    _look_at_environment()
    cleaned = _mask(text)
    if "%" in cleaned:
        cleaned = _WORD.sub(_decoded, cleaned)
    return cleaned


def _mask(text: str) -> str:
    if _State.pattern is not None:
        text = _State.pattern.sub(lambda found: _known[found[0]], text)
    if may_hold_known_form(text):
        text = KNOWN_FORM.sub(urls.HIDDEN, text)
    return urls.hide(text) if "=" in text or "://" in text else text


def _decoded(found: re.Match[str]) -> str:
    """Any character of a URL may be spelled with a percent sign, more than once."""
    text = found[0]
    for _ in range(3 if "%" in text else 0):
        decoded = unquote(text)
        if decoded == text:
            break
        cleaned = _mask(decoded)
        if cleaned != decoded:
            return " ".join(cleaned.split())
        text = decoded
    return found[0]


def _look_at_environment() -> None:
    """Learns of the secrets in it where it has changed; comparing costs a microsecond."""
    # The bytes themselves: to go through `os.environ` decodes each name and value anew.
    environ = getattr(os.environ, "_data", None)
    now = os.environ if environ is None else environ
    if _State.secrets is not _known or now != _State.environ:
        seen = dict(now)
        for name, value in list(os.environ.items()):
            if is_secret(name, value):
                add_secret(name, value)
            else:
                add_secrets_of(value)
        # Last, so that no other thread takes it for looked at before it is.
        _State.environ, _State.secrets, _State.count = seen, _known, -1
    if _State.count != len(_known):
        longest_first = sorted(_known, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        _State.pattern, _State.count = pattern, len(longest_first)


def redacted(value: Any) -> Any:
    """`value` with its texts redacted: in lists and mappings too, but for their keys."""
    return texts_in(value, redact)


def as_json(
    value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> str:
    """`value` as the job writes JSON: no secret, and nothing that steers a terminal."""
    return json_text(redacted(value), indent=indent, default=default)


def shown(text: str) -> str:
    """Text of several lines as it goes to a terminal or a file for people."""
    return printable(redact(text), keep="\n\t")


class Screen:
    """Writes text that comes in pieces, each as soon as it cannot be part of a secret."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._held = write, ""

    def write(self, text: str) -> None:
        self._held += text
        end = self._certain()
        if end:
            self._write(shown(self._held[:end]))
            self._held = self._held[end:]

    def close(self) -> None:
        """Writes what is held back."""
        self._write(shown(self._held))
        self._held = ""

    def _certain(self) -> int:
        """How much may go: what could begin a secret waits for its end."""
        _look_at_environment()
        text = self._held
        end = len(text)
        for secret in (*_known, *MARKS, "://"):
            for length in range(min(len(secret) - 1, len(text)), 0, -1):
                if text.endswith(secret[:length]):
                    end = min(end, len(text) - length)
                    break
        for found in _State.pattern.finditer(text) if _State.pattern else ():
            if found.start() < end < found.end():
                end = found.start()  # whole, its end may be the beginning of another
        begin = text.rfind("-----BEGIN")
        if begin >= 0 and "-----END" not in text[begin:]:
            return min(end, begin)
        # What is known by its form has no spaces; its word waits where it has the beginning of one.
        word = max(map(text.rfind, " \n\t")) + 1
        begun = "://" in text[word:] or may_hold_known_form(text[word:])
        return min(end, word) if begun or text[:word].endswith(("earer ", "Basic ")) else end


def print_traceback(error: BaseException) -> None:
    """What Python would print of the error and of those that caused it."""
    sys.stderr.write(shown("".join(traceback.format_exception(error))))


def install() -> None:
    """Has Python's own words redacted too: tracebacks that nobody catches, and warnings."""

    def uncaught(kind: type[BaseException], error: BaseException, _: object) -> None:
        if not issubclass(kind, SystemExit):
            print_traceback(error)

    def in_thread(told: threading.ExceptHookArgs) -> None:
        if told.exc_value is not None:
            uncaught(told.exc_type, told.exc_value, told.exc_traceback)

    def unraisable(told: "sys.UnraisableHookArgs") -> None:
        if told.exc_value is not None:
            sys.stderr.write(shown(f"{told.err_msg or 'Exception ignored in'}: {told.object!r}\n"))
            print_traceback(told.exc_value)

    plain = warnings.formatwarning

    def warned(*what: Any, **more: Any) -> str:
        return shown(plain(*what, **more))

    sys.excepthook, threading.excepthook = uncaught, in_thread
    sys.unraisablehook = unraisable
    warnings.formatwarning = warned
