"""Keeps secrets, and control characters from data, out of everything that the job writes.

Imports no other module of the job. `kinds` decides what is a secret, `urls` finds secrets in URLs,
`terminal` escapes control characters. Secrets of environment variables are replaced by `${NAME}`;
others, recognized by their format or position, by `***`.
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
    KNOWN_FORMAT,
    MARKS,
    is_secret,
    is_secret_in_spec,
    is_secret_name,
    may_contain_known_format,
)
from job.redaction.terminal import CONTROL, json_text, map_texts, printable

__all__ = [
    "CONTROL",
    "RedactingWriter",
    "add_known_secrets",
    "add_secret",
    "add_secrets_of",
    "as_json",
    "holds_secret",
    "install",
    "is_secret",
    "is_secret_in_spec",
    "is_secret_name",
    "known_secrets",
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
"""The replacement for each encoding of each secret known so far."""


class _State:
    """Caches the pattern of all known secrets until they or the environment change."""

    environ: object = None
    secrets: dict[str, str] | None = None
    count = -1
    pattern: re.Pattern[str] | None = None


def add_secret(name: str, value: str) -> None:
    """Registers a secret, which `redact` replaces by `${name}`."""
    _add(value, "${" + name + "}")
    # Parts may appear alone, such as the key of a connection string or a line of a PEM block.
    for part in (*urls.secrets(value), *spellings.parts(value)):
        _add(part, "${" + name + "}")


def add_secrets_of(uri: str) -> None:
    """Registers the passwords and signatures in `uri`, which `redact` replaces by `***`."""
    if "://" in uri or ("=" in uri and ";" in uri):
        for secret in urls.secrets(uri):
            _add(secret, urls.HIDDEN)


def holds_secret(name: str, value: str) -> bool:
    """Whether a variable's value, used in a spec, is a secret or a URI that contains one."""
    return is_secret_in_spec(name, value) or next(urls.secrets(value), None) is not None


def known_secrets() -> dict[str, str]:
    """The secrets known so far, to pass to `add_known_secrets` in a child process."""
    return dict(_known)


def add_known_secrets(secrets: Mapping[str, str]) -> None:
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
    """Replaces known secrets in `text` by `${NAME}`, and text that looks like a secret by `***`."""
    _learn_environment()
    cleaned = _mask(text)
    if "%" in cleaned:
        cleaned = _WORD.sub(_decoded, cleaned)
    return cleaned


def _mask(text: str) -> str:
    if _State.pattern is not None:
        text = _State.pattern.sub(lambda match: _known[match[0]], text)
    if may_contain_known_format(text):
        text = KNOWN_FORMAT.sub(urls.HIDDEN, text)
    return urls.hide(text) if "=" in text or "://" in text else text


def _decoded(match: re.Match[str]) -> str:
    """Redacts a word whose characters are percent-encoded, perhaps more than once."""
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
    """Registers the secrets of the environment if it has changed (checking takes a microsecond)."""
    # Compare the raw bytes: `os.environ` would decode every name and value.
    environ = getattr(os.environ, "_data", None)
    now = os.environ if environ is None else environ
    if _State.secrets is not _known or now != _State.environ:
        seen = dict(now)
        for name, value in list(os.environ.items()):
            if is_secret(name, value):
                add_secret(name, value)
            else:
                add_secrets_of(value)
        # Set last, so that no other thread takes a half-read environment for complete.
        _State.environ, _State.secrets, _State.count = seen, _known, -1
    if _State.count != len(_known):
        longest_first = sorted(_known, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        _State.pattern, _State.count = pattern, len(longest_first)


def redacted(value: T) -> T:
    """`value` with all its texts redacted, at any depth; mapping keys stay unchanged."""
    return map_texts(value, redact)


def as_json(
    value: object, *, indent: int | None = None, default: Callable[[object], object] | None = None
) -> str:
    """`value` as JSON without secrets or control characters."""
    return json_text(redacted(value), indent=indent, default=default)


def shown(text: str) -> str:
    """Text for display: redacted, with control characters escaped; keeps line ends and tabs."""
    return printable(redact(text), keep="\n\t")


class RedactingWriter:
    """Redacts a stream of text; holds back the end of it while it may be part of a secret."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._held = write, ""

    def write(self, text: str) -> None:
        self._held += text
        end = self._certain()
        if end:
            self._write(shown(self._held[:end]))
            self._held = self._held[end:]

    def close(self) -> None:
        """Writes the text held back."""
        self._write(shown(self._held))
        self._held = ""

    def _certain(self) -> int:
        """The number of characters that can be written: those that cannot begin a secret."""
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
                end = match.start()  # a complete secret whose end may begin another one
        begin = text.rfind("-----BEGIN")
        if begin >= 0 and "-----END" not in text[begin:]:
            return min(end, begin)
        # Secrets of a known format have no spaces: hold back a word that begins like one.
        word = max(map(text.rfind, " \n\t")) + 1
        suspicious = "://" in text[word:] or may_contain_known_format(text[word:])
        return min(end, word) if suspicious or text[:word].endswith(("earer ", "Basic ")) else end


def print_traceback(error: BaseException) -> None:
    """Prints the traceback of the error and its causes, redacted."""
    sys.stderr.write(shown("".join(traceback.format_exception(error))))


def install() -> None:
    """Redacts what Python itself prints: uncaught exceptions and warnings."""

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
