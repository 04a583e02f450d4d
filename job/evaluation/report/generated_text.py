"""Prepares model output for the page: truncates it, makes it visible, and marks differences.

The template escapes HTML. This module replaces the characters that escaping does not: control
characters, invisible characters, and those that change the direction of text.
"""

import re
from dataclasses import dataclass
from typing import Literal

MAX_CHARACTERS = 400
"""Maximum number of characters that are shown of a text."""
MAX_UNLIKE_CHARACTERS = 160
"""The same for an answer that has little in common with its label."""

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_FORBIDDEN = re.compile("[\x80-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Units of a difference: a LaTeX command, an escaped character, a number, any other character.
_UNIT = re.compile(r"\\[a-zA-Z]+|\\.|[0-9]+|.", re.DOTALL)

Mark = Literal["same", "extra", "missing"]


@dataclass(frozen=True)
class Span:
    """A part of an answer: same as in the label, extra, or missing from the answer."""

    mark: Mark
    text: str


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a text, and the number of characters left out."""

    spans: tuple[Span, ...]
    more: int


def visible(text: str) -> str:
    """The text with control, direction and zero-width characters replaced by visible ones."""
    text = text.translate(_CONTROL_PICTURES).replace("\x7f", "␡")
    text = _INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)
    return _FORBIDDEN.sub("\ufffd", text)


def plain(text: str, limit: int = MAX_CHARACTERS) -> Excerpt:
    """The beginning of a text, without a comparison."""
    spans = (Span("same", text[:limit]),) if text else ()
    return Excerpt(spans, max(0, len(text) - limit))


def difference(answer: str, label: str, limit: int = MAX_CHARACTERS) -> Excerpt:
    """The beginning of an answer, with its differences from the label.

    Without the extra spans it reads as the label; without the missing ones, as the answer. An
    answer less than a third similar to its label is one extra span, because scattered matches would
    be noise.
    """
    from rapidfuzz.distance import Levenshtein

    whole = answer.strip()
    answer, label = whole[:limit], label.strip()[:limit]
    actual, expected = _UNIT.findall(answer), _UNIT.findall(label)
    if Levenshtein.normalized_similarity(expected, actual) < 1 / 3:
        answer = answer[:MAX_UNLIKE_CHARACTERS]
        return Excerpt((Span("extra", answer),) if answer else (), len(whole) - len(answer))
    spans: list[Span] = []
    for change in Levenshtein.opcodes(expected, actual):
        missing = "".join(expected[change.src_start : change.src_end])
        extra = "".join(actual[change.dest_start : change.dest_end])
        if change.tag == "equal":
            spans.append(Span("same", extra))
            continue
        if missing:
            spans.append(Span("missing", missing))
        if extra:
            spans.append(Span("extra", extra))
    return Excerpt(tuple(spans), len(whole) - len(answer))
