"""Text that a model wrote, made safe to show: bounded, visible, and marked where it is wrong.

The template escapes HTML. What is left to do here is what escaping does not: characters that a
page must not hold, that show nothing, or that turn the text around them.
"""

import re
from dataclasses import dataclass
from typing import Literal

LONGEST = 400
"""Characters of a text that are shown."""
LONGEST_UNLIKE = 160
"""Characters that are shown of an answer which shares little with its label."""

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_UNSEEN = re.compile(
    "[\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_FORBIDDEN = re.compile("[\x80-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# What changes as one: a LaTeX command, an escaped sign, a number, any other character.
_UNIT = re.compile(r"\\[a-zA-Z]+|\\.|[0-9]+|.", re.DOTALL)

Mark = Literal["same", "extra", "missing"]


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: as in the label, in excess of it, or of the label and missing."""

    mark: Mark
    text: str


@dataclass(frozen=True)
class Shown:
    """The start of a text in pieces, and how many characters of it are not shown."""

    pieces: tuple[Piece, ...]
    more: int


def visible(text: str) -> str:
    """The text with its control, direction and zero-width characters as signs that can be seen."""
    text = text.translate(_CONTROL_PICTURES).replace("\x7f", "␡")
    text = _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
    return _FORBIDDEN.sub("\ufffd", text)


def plain(text: str, limit: int = LONGEST) -> Shown:
    """The text's start, without marks."""
    pieces = (Piece("same", text[:limit]),) if text else ()
    return Shown(pieces, max(0, len(text) - limit))


def difference(answer: str, label: str, limit: int = LONGEST) -> Shown:
    """The answer's start with what differs from the label's marked.

    Without the extra pieces it reads as the label, without the missing ones as the answer. An
    answer that shares less than a third with its label is one piece in excess: a salad of single
    signs that happen to agree helps nobody.
    """
    from rapidfuzz.distance import Levenshtein

    whole = answer.strip()
    answer, label = whole[:limit], label.strip()[:limit]
    found, expected = _UNIT.findall(answer), _UNIT.findall(label)
    if Levenshtein.normalized_similarity(expected, found) < 1 / 3:
        answer = answer[:LONGEST_UNLIKE]
        return Shown((Piece("extra", answer),) if answer else (), len(whole) - len(answer))
    pieces: list[Piece] = []
    for change in Levenshtein.opcodes(expected, found):
        lost = "".join(expected[change.src_start : change.src_end])
        won = "".join(found[change.dest_start : change.dest_end])
        if change.tag == "equal":
            pieces.append(Piece("same", won))
            continue
        if lost:
            pieces.append(Piece("missing", lost))
        if won:
            pieces.append(Piece("extra", won))
    return Shown(tuple(pieces), len(whole) - len(answer))
