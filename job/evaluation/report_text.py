"""Text that a model wrote, made safe to show: bounded, visible, and marked where it is wrong.

The template escapes HTML. What is left to do here is what escaping does not: characters that a
page must not hold, that show nothing, or that turn the text around them.
"""

import re
from dataclasses import dataclass
from typing import Literal

LONGEST = 400
"""Characters of a text that are shown."""

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_UNSEEN = re.compile(
    "[\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_FORBIDDEN = re.compile("[\x80-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

Mark = Literal["same", "extra", "missing"]


@dataclass(frozen=True)
class Shown:
    """The start of a text, and how much of it is not shown."""

    text: str
    more: int


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: as in the label, in excess of it, or of the label and missing."""

    mark: Mark
    text: str


def show(text: str, limit: int = LONGEST) -> Shown:
    """At most `limit` characters, with what cannot be seen made visible."""
    return Shown(visible(text[:limit]), max(0, len(text) - limit))


def visible(text: str) -> str:
    """The text with its control, direction and zero-width characters as signs that can be seen."""
    text = text.translate(_CONTROL_PICTURES).replace("\x7f", "␡")
    text = _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
    return _FORBIDDEN.sub("\ufffd", text)


def difference(answer: str, label: str, limit: int = LONGEST) -> tuple[Piece, ...]:
    """The answer's shown part against the label's, in pieces.

    An answer that shares less than a third with its label is one piece in excess: a salad of
    single letters that happen to agree helps nobody.
    """
    from rapidfuzz.distance import Levenshtein

    answer, label = answer.strip()[:limit], label.strip()[:limit]
    if Levenshtein.normalized_similarity(label, answer) < 1 / 3:
        return (Piece("extra", visible(answer)),) if answer else ()
    pieces: list[Piece] = []
    for change in Levenshtein.opcodes(label, answer):
        lost = label[change.src_start : change.src_end]
        found = answer[change.dest_start : change.dest_end]
        if change.tag == "equal":
            pieces.append(Piece("same", visible(found)))
            continue
        if lost:
            pieces.append(Piece("missing", visible(lost)))
        if found:
            pieces.append(Piece("extra", visible(found)))
    return tuple(pieces)
