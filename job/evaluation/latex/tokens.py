"""Tokenizes LaTeX, and joins tokens."""

import re
from collections.abc import Iterable

from job.evaluation.latex.commands import (
    DROPPED,
    DROPPED_WITH_ARGUMENT,
    DROPPED_WITH_LENGTH,
    SYNONYMS,
)

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\\s|\\.|\S", re.DOTALL)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_LENGTH = re.compile(r"[-+]?[0-9.,]+(?:pt|em|ex|mm|cm|in|mu|pc|bp|sp)")


class UnreadableError(Exception):
    """Unbalanced braces, a missing argument, or too deeply nested groups."""


def tokenize(latex: str) -> tuple[str, ...]:
    r"""Commands (`\alpha`), escaped characters (`\{`) and single characters, without white space.

    A backslash before any white space is the token `\ `; a trailing backslash is a token too.
    """
    return tuple("\\ " if item[-1].isspace() else item for item in _TOKEN.findall(latex))


def join(tokens: Iterable[str]) -> str:
    """Concatenates tokens, with a space only between a command and a letter."""
    out: list[str] = []
    after_command = False
    for item in tokens:
        if after_command and item[0].isascii() and item[0].isalpha():
            out.append(" ")
        out.append(item)
        after_command = _COMMAND.fullmatch(item) is not None
    return "".join(out)


def without_spacing(tokens: tuple[str, ...]) -> list[str]:
    """Replaces synonyms, and drops spacing and other commands without visible output."""
    out: list[str] = []
    at = 0
    while at < len(tokens):
        item = tokens[at]
        at += 1
        if item in DROPPED_WITH_ARGUMENT:
            at = after_group(tokens, at + (tokens[at : at + 1] == ("*",)))
        elif item in DROPPED_WITH_LENGTH:
            length = _LENGTH.match("".join(tokens[at : at + 16]))
            at += length.end() if length else 0
        elif item not in DROPPED:
            name = SYNONYMS.get(item, item)
            if name != "*" or out[-1:] != [r"\operatorname"]:
                out.append(name)
    return out


def after_group(tokens: tuple[str, ...], start: int) -> int:
    """The index after the group that begins at `start`; `start` itself if there is no group."""
    if tokens[start : start + 1] != ("{",):
        return start
    depth = 0
    for at in range(start, len(tokens)):
        depth += (tokens[at] == "{") - (tokens[at] == "}")
        if depth == 0:
            return at + 1
    raise UnreadableError
