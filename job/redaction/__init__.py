"""Keeps secrets, and control characters from data, out of everything that the job writes.

Imports nothing of the job. `kinds` says what a secret is, `urls` finds those in URLs, `terminal`
escapes control characters. Secrets from the environment, or read from it by the spec, are replaced
by their variables' names; others, recognized by their form or position, by `***`.
"""

import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import unquote

from job.redaction import spellings, urls
from job.redaction.kinds import (
    KNOWN_FORM,
    MARKS,
    is_secret,
    is_secret_in_spec,
    is_secret_name,
    may_hold_known_form,
)
from job.redaction.terminal import CONTROL, json_text, map_texts, printable

__all__ = [
    "CONTROL",
    "RedactingWriter",
    "add_secret",
    "add_secrets_of",
    "adopt",
    "as_json",
    "holds_secret",
    "install",
    "is_secret",
    "is_secret_in_spec",
    "is_secret_name",
    "known",
    "print_traceback",
    "printable",
    "redact",
    "redacted",
    "shown",
]

T = TypeVar("T")

_SHORTEST_SECRET = 6  # anything shorter would redact parts of ordinary text
_WORD = re.compile(r"\S+")

_known: dict[str, str] = {}
"""Every spelling of every secret met so far, with its replacement."""


class _State:
    """Derived from the environment and the known secrets; valid while both are unchanged."""

    environ: object = None
    secrets: dict[str, str] | None = None
    count = -1
    pattern: re.Pattern[str] | None = None


def add_secret(name: str, value: str) -> None:
    """From now on writes `${name}` instead of `value`."""
    _add(value, "${" + name + "}")
    # Parts of it are used alone, such as the key in a connection string or a line of a PEM block.
    for part in (*urls.secrets(value), *spellings.parts(value)):
        _add(part, "${" + name + "}")


def add_secrets_of(uri: str) -> None:
    """From now on writes `***` instead of the passwords and signatures in `uri`."""
    if "://" in uri or ("=" in uri and ";" in uri):
        for secret in urls.secrets(uri):
            _add(secret, urls.HIDDEN)


def holds_secret(name: str, value: str) -> bool:
    """Whether the value that a spec reads from a variable is a secret, or a URI with one."""
    return is_secret_in_spec(name, value) or next(urls.secrets(value), None) is not None


def known() -> dict[str, str]:
    """The secrets met so far, for `adopt` in a child process."""
    return dict(_known)


def adopt(secrets: Mapping[str, str]) -> None:
    """Adds the secrets of another process."""
    _known.update(secrets)


def _add(value: str, replacement: str) -> None:
    for text in {value, value.strip()}:
        if len(text) >= _SHORTEST_SECRET and text not in _known and not _is_hidden(text):
            for spelled in spellings.spellings(text):
                _known.setdefault(spelled, replacement)


def _is_hidden(text: str) -> bool:
    return re.fullmatch(r"\$\{\w+\}|\*+", text) is not None


def redact(text: str) -> str:
    """`text` with known secrets replaced by their names, and what looks like one by `***`."""
    _learn_environment()
    cleaned = _mask(text)
    if "%" in cleaned:
        cleaned = _WORD.sub(_decoded, cleaned)
    return cleaned


def _mask(text: str) -> str:
    if _State.pattern is not None:
        text = _State.pattern.sub(lambda match: _known[match[0]], text)
    if may_hold_known_form(text):
        text = KNOWN_FORM.sub(urls.HIDDEN, text)
    return urls.hide(text) if "=" in text or "://" in text else text


def _decoded(match: re.Match[str]) -> str:
    """Any character of a URL may be percent-encoded, more than once."""
    text = match[0]
    for _ in range(3 if "%" in text else 0):
        decoded = unquote(text)
        if decoded == text:
            break
        cleaned = _mask(decoded)
        if cleaned != decoded:
            return " ".join(cleaned.split())
        text = decoded
    return match[0]


def _learn_environment() -> None:
    """Adds the secrets of the environment if it has changed; comparing takes a microsecond."""
    # The raw bytes: `os.environ` decodes every name and value again.
    environ = getattr(os.environ, "_data", None)
    now = os.environ if environ is None else environ
    if _State.secrets is not _known or now != _State.environ:
        seen = dict(now)
        for name, value in list(os.environ.items()):
            if is_secret(name, value):
                add_secret(name, value)
            else:
                add_secrets_of(value)
        # Last, so that no other thread skips an environment that is only half read.
        _State.environ, _State.secrets, _State.count = seen, _known, -1
    if _State.count != len(_known):
        longest_first = sorted(_known, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        _State.pattern, _State.count = pattern, len(longest_first)


def redacted(value: T) -> T:
    """`value` with its texts redacted, also in lists and mappings, except for keys."""
    return map_texts(value, redact)


def as_json(
    value: object, *, indent: int | None = None, default: Callable[[object], object] | None = None
) -> str:
    """`value` as JSON without secrets or control characters."""
    return json_text(redacted(value), indent=indent, default=default)


def shown(text: str) -> str:
    """Text of several lines without secrets or control characters, for people to read."""
    return printable(redact(text), keep="\n\t")


class RedactingWriter:
    """Writes text that arrives in pieces, each as soon as it cannot be part of a secret."""

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
        """How much can be written: the possible beginning of a secret waits for its end."""
        _learn_environment()
        text = self._held
        end = len(text)
        for secret in (*_known, *MARKS, "://"):
            for length in range(min(len(secret) - 1, len(text)), 0, -1):
                if text.endswith(secret[:length]):
                    end = min(end, len(text) - length)
                    break
        for match in _State.pattern.finditer(text) if _State.pattern else ():
            if match.start() < end < match.end():
                end = match.start()  # complete, but its end may be the beginning of another
        begin = text.rfind("-----BEGIN")
        if begin >= 0 and "-----END" not in text[begin:]:
            return min(end, begin)
        # Secrets of a known form have no spaces: a word that begins like one waits for its end.
        word = max(map(text.rfind, " \n\t")) + 1
        begun = "://" in text[word:] or may_hold_known_form(text[word:])
        return min(end, word) if begun or text[:word].endswith(("earer ", "Basic ")) else end


def print_traceback(error: BaseException) -> None:
    """Prints the traceback of the error and its causes, redacted."""
    sys.stderr.write(shown("".join(traceback.format_exception(error))))


def install() -> None:
    """Also redacts what Python prints itself: uncaught exceptions and warnings."""

    def uncaught(kind: type[BaseException], error: BaseException, _: object) -> None:
        if not issubclass(kind, SystemExit):
            print_traceback(error)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            uncaught(args.exc_type, args.exc_value, args.exc_traceback)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        if args.exc_value is not None:
            sys.stderr.write(shown(f"{args.err_msg or 'Exception ignored in'}: {args.object!r}\n"))
            print_traceback(args.exc_value)

    format_warning = warnings.formatwarning

    def warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        return shown(format_warning(message, category, filename, lineno, line))

    sys.excepthook, threading.excepthook = uncaught, in_thread
    sys.unraisablehook = unraisable
    warnings.formatwarning = warning
