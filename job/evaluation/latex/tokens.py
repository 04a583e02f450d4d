"""LaTeX as tokens, and tokens as LaTeX."""

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
    """Braces that do not match, an argument that is missing, or groups too deep to follow."""


def tokenize(latex: str) -> tuple[str, ...]:
    r"""Commands (`\alpha`), escaped characters (`\{`) and single characters; no white space.

    White space after a backslash is a token, `\ `, whatever kind it is; a backslash at the end of
    the text is one of its own.
    """
    return tuple("\\ " if item[-1].isspace() else item for item in _TOKEN.findall(latex))


def join(tokens: Iterable[str]) -> str:
    """Tokens side by side, with a space only where a letter follows a command."""
    out: list[str] = []
    after_command = False
    for item in tokens:
        if after_command and item[0].isascii() and item[0].isalpha():
            out.append(" ")
        out.append(item)
        after_command = _COMMAND.fullmatch(item) is not None
    return "".join(out)


def without_spacing(tokens: tuple[str, ...]) -> list[str]:
    """Synonyms under one name, without spacing and other commands that draw nothing."""
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
    """Where the group that begins at `start` is over; `start` where none begins there."""
    if tokens[start : start + 1] != ("{",):
        return start
    depth = 0
    for at in range(start, len(tokens)):
        depth += (tokens[at] == "{") - (tokens[at] == "}")
        if depth == 0:
            return at + 1
    raise UnreadableError
