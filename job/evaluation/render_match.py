r"""Render match: the share of rows whose prediction draws the picture that the label draws.

Both are drawn by mathtext in one font and compared as pictures, so that it does not matter how a
formula is spelled: `\le` and `\leq`, `x^2` and `{x}^{ 2 }` are one picture.

1. Dollars and `\[ … \]` around a text go. The normal form of what is left (`latex.normalize`) is
   drawn, so spacing and size commands do not count; where mathtext cannot draw the normal form,
   the text as it is.
2. The picture is binarised, cut to its ink and laid on a canvas that holds both, top left.
3. Two pictures are equal where their sizes differ by at most `SLACK` pixels and every inked pixel
   of each has ink of the other within one pixel of it. A capital is about 28 pixels high.

What is trimmed away cannot be told apart: a lone `.` and a lone `\cdot` are one dot.

A row whose label cannot be drawn says nothing about the model: it is left out of the share and
counted as `render_skipped`. A prediction that cannot be drawn does not match, and is counted as
`render_failed`. mathtext knows no tables or line breaks (`\begin{array}`), and text outside ASCII
is not drawn: one box stands for all that the font lacks, and equal boxes would be a match.

A row takes about 10 ms. Text of more than `LONGEST` characters is not drawn: that many take a
fifth of a second, and the time grows with the length.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from job.evaluation import latex
from job.prep.formulas.render import render_latex

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

NAME = "render_match"
LONGEST = 1_000
"""Characters beyond which a text is not drawn."""
SLACK = 2
"""Pixels by which the sizes of equal pictures may differ."""

Outcome = Literal["match", "differs", "failed", "skipped"]

_FONT, _SIZE, _DPI = "cm", 20, 144
_DARK = 128  # grey below this is ink
_DRAWABLE = re.compile(r"[\s -~]*", re.ASCII)
_AROUND = re.compile(r"^(?:\$\$?|\\\[|\\\()(.*?)(?:\$\$?|\\\]|\\\))$", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class RenderMatch:
    """All rows together."""

    render_match: float | None
    """None where no label can be drawn."""
    render_skipped: int
    """Rows whose label cannot be drawn."""
    render_failed: int
    """Rows whose label can be drawn and whose prediction cannot."""


def summarize(outcomes: Sequence[Outcome]) -> RenderMatch:
    """The share of matches among the rows that were not skipped, and what was not compared."""
    count = Counter(outcomes)
    drawn = len(outcomes) - count["skipped"]
    return RenderMatch(
        render_match=count["match"] / drawn if drawn else None,
        render_skipped=count["skipped"],
        render_failed=count["failed"],
    )


def compare(prediction: str, label: str) -> Outcome:
    """One prediction against its label; never raises, whatever the texts are."""
    expected = _ink(label)
    if expected is None:
        return "skipped"
    found = _ink(prediction)
    if found is None:
        return "failed"
    return "match" if same_picture(found, expected) else "differs"


def draw(text: str, size: float = _SIZE, dpi: int = _DPI) -> "Image | None":
    """The picture that is compared; None where the text is too long or cannot be drawn."""
    text = text.strip()
    if len(text) > LONGEST or not _DRAWABLE.fullmatch(text):
        return None
    around = _AROUND.match(text)
    text = around[1] if around else text
    normal = latex.normalize(text)
    for source in dict.fromkeys((normal, text)):
        # Space of any width could be asked for, and mathtext would take the memory for it.
        if not source or r"\hspace" in source:
            continue
        try:
            image = render_latex(source, _FONT, size, dpi)
        except Exception:  # noqa: BLE001  nothing that a model writes may end the evaluation
            image = None
        if image is not None:
            return image
    return None


def same_picture(one: "np.ndarray", other: "np.ndarray") -> bool:
    """Whether two trimmed pictures of ink (H, W) are equal within the tolerance."""
    import numpy as np

    if any(abs(a - b) > SLACK for a, b in zip(one.shape, other.shape, strict=True)):
        return False
    height, width = np.maximum(one.shape, other.shape)
    a, b = (
        np.pad(ink, ((1, height - ink.shape[0] + 1), (1, width - ink.shape[1] + 1)))
        for ink in (one, other)
    )  # (height + 2, width + 2): a white border, so that growing stays inside
    return not (a & ~_grown(b)).any() and not (b & ~_grown(a)).any()


def _ink(text: str) -> "np.ndarray | None":
    """True where the text's picture is dark (H, W), cut to what is."""
    import numpy as np

    image = draw(text)
    if image is None:
        return None
    ink = np.asarray(image.convert("L")) < _DARK
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(rows):
        return None
    cut: np.ndarray = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return cut


def _grown(ink: "np.ndarray") -> "np.ndarray":
    """The ink and every pixel that touches it; the border of `ink` is white."""
    out = ink.copy()
    out[1:] |= ink[:-1]
    out[:-1] |= ink[1:]
    wide: np.ndarray = out.copy()
    wide[:, 1:] |= out[:, :-1]
    wide[:, :-1] |= out[:, 1:]
    return wide
