"""Writes Markdown from templates, with every value escaped."""

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from job.redaction import printable, redact

if TYPE_CHECKING:
    from jinja2 import Environment

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~&$])")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def escape(value: object) -> str:
    """A value as Markdown that shows it, on one line, without secrets."""
    if isinstance(value, Markdown):
        return value
    return _SPECIAL.sub(r"\\\1", _one_line(str(value)))


def code(value: object) -> Markdown:
    """A value as a code span; also in a table."""
    text = _one_line(str(value))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|"))


def block(value: str, language: str = "") -> Markdown:
    """Lines of text as a code block."""
    text = printable(redact(value), keep="\n\t").strip("\n")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def _one_line(text: str) -> str:
    return printable(" ".join(redact(text).split()))


@functools.cache  # with the templates that it has compiled
def environment(folder: Path) -> "Environment":
    """A Jinja environment that escapes every value that is not `Markdown`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=False,  # noqa: S701 - `finalize` escapes, for Markdown rather than HTML
        undefined=StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"code": code, "block": block}
    return made
