r"""Render match: the fraction of rows whose prediction renders to the same image as the label.

Both are rendered by matplotlib's mathtext and compared as images, so spelling does not matter:
`\le` and `\leq`, or `x^2` and `{x}^{ 2 }`, are the same image.

1. Surrounding dollars and `\[ … \]` are removed. The normal form of the rest (`latex.normalize`) is
   rendered, so spacing and size commands do not matter; if mathtext cannot render the normal form,
   the original text is rendered.
2. Images are binarized, cropped to their ink and aligned at the top left.
3. Two images are equal if their sizes differ by at most `SLACK` pixels and every inked pixel of
   each has ink of the other within one pixel. A capital letter is about 28 pixels high.

Cropping removes position: a lone `.` and a lone `\cdot` are the same dot.

Rows whose label cannot be rendered are excluded and counted as
`render_skipped`. A prediction that cannot be rendered does not match, and is counted as
`render_failed`. mathtext has no tables or line breaks (`\begin{array}`), and non-ASCII text is not
rendered: missing glyphs all look the same, and would match.

A formula takes about 2 ms, and one that cannot be rendered mostly less. Those of the last
`RECENT` texts are kept: labels come back with every evaluation. Text longer than `MAX_CHARACTERS`
is not rendered.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from job.evaluation import latex
from job.prep.formulas.render import render_latex

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

NAME = "render_match"
MAX_CHARACTERS = 1_000
"""Longer text is not rendered."""
RECENT = 4096
"""Texts whose ink is kept: some kilobytes each."""
SLACK = 2
"""Pixels by which the sizes of matching images may differ."""

Outcome = Literal["match", "differs", "failed", "skipped"]

_FONT, _SIZE, _DPI = "cm", 20, 144
_INK = 128  # gray levels below this are ink
_RENDERABLE = re.compile(r"[\s -~]*", re.ASCII)
_DELIMITED = re.compile(r"^(?:\$\$?|\\\[|\\\()(.*?)(?:\$\$?|\\\]|\\\))$", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Ink:
    """The cropped ink of a rendered formula, one bit for each pixel."""

    bits: bytes
    shape: tuple[int, int]
    """Height and width in pixels."""

    @classmethod
    def of(cls, mask: "np.ndarray") -> "Ink":
        """Packs a mask (H, W)."""
        import numpy as np

        height, width = mask.shape
        return cls(bits=np.packbits(mask).tobytes(), shape=(height, width))

    def mask(self) -> "np.ndarray":
        """The mask (H, W): True where there is ink."""
        import numpy as np

        height, width = self.shape
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=height * width)
        return bits.view(bool).reshape(height, width)

    def matches(self, other: "Ink") -> bool:
        """Whether both show the same formula."""
        return self == other or same_image(self.mask(), other.mask())


@dataclass(frozen=True, kw_only=True)
class RenderMatch:
    """The metric over all rows."""

    render_match: float | None
    """None if no label can be rendered."""
    render_skipped: int
    """Rows whose label cannot be rendered."""
    render_failed: int
    """Rows whose label can be rendered but whose prediction cannot."""


def summarize(outcomes: Sequence[Outcome]) -> RenderMatch:
    """The fraction of matches among rows that were not skipped, and the numbers of the others."""
    count = Counter(outcomes)
    compared = len(outcomes) - count["skipped"]
    return RenderMatch(
        render_match=count["match"] / compared if compared else None,
        render_skipped=count["skipped"],
        render_failed=count["failed"],
    )


def compare(prediction: str, label: str) -> Outcome:
    """Compares a prediction with its label; never raises."""
    expected = ink(label)
    if expected is None:
        return "skipped"
    predicted = ink(prediction)
    if predicted is None:
        return "failed"
    return "match" if predicted.matches(expected) else "differs"


def render(text: str, size: float = _SIZE, dpi: int = _DPI) -> "Image | None":
    """The image to compare; None if the text is too long or cannot be rendered."""
    for source in _sources(text):
        if (image := _draw(source, size, dpi)) is not None:
            return image
    return None


def ink(text: str) -> "Ink | None":
    """The ink of the rendered text; None if it cannot be rendered. Kept for `RECENT` texts."""
    for source in _sources(text):
        if (found := _ink(source)) is not None:
            return found if found.bits else None
    return None


def same_image(one: "np.ndarray", other: "np.ndarray") -> bool:
    """Whether two cropped ink masks (H, W) are equal within the tolerance."""
    import numpy as np

    if any(abs(a - b) > SLACK for a, b in zip(one.shape, other.shape, strict=True)):
        return False
    height, width = np.maximum(one.shape, other.shape)
    a, b = (
        np.pad(ink, ((1, height - ink.shape[0] + 1), (1, width - ink.shape[1] + 1)))
        for ink in (one, other)
    )  # (height + 2, width + 2): a white border for the dilation
    return not (a & ~_dilated(b)).any() and not (b & ~_dilated(a)).any()


def _sources(text: str) -> Iterable[str]:
    """What to render: the normal form, and then the text itself."""
    text = text.strip()
    if len(text) > MAX_CHARACTERS or not _RENDERABLE.fullmatch(text):
        return ()
    delimited = _DELIMITED.match(text)
    text = delimited[1] if delimited else text
    # A huge \hspace would make mathtext allocate a huge image.
    sources = dict.fromkeys((latex.normalize(text), text))
    return [source for source in sources if source and r"\hspace" not in source]


def _draw(source: str, size: float, dpi: int) -> "Image | None":
    try:
        return render_latex(source, _FONT, size, dpi)
    except Exception:  # noqa: BLE001  model output must not end the evaluation
        return None


@lru_cache(RECENT)
def _ink(source: str) -> Ink | None:
    """The ink of LaTeX, which may be none; None if it cannot be rendered."""
    import numpy as np

    image = _draw(source, _SIZE, _DPI)
    if image is None:
        return None
    mask = np.asarray(image.convert("L")) < _INK
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Ink(bits=b"", shape=(0, 0))
    return Ink.of(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _dilated(ink: "np.ndarray") -> "np.ndarray":
    """The ink and its 8-neighborhood; the border of `ink` must be white."""
    vertical = ink.copy()
    vertical[1:] |= ink[:-1]
    vertical[:-1] |= ink[1:]
    out: np.ndarray = vertical.copy()
    out[:, 1:] |= vertical[:, :-1]
    out[:, :-1] |= vertical[:, 1:]
    return out
