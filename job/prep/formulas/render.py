"""Pictures of LaTeX formulas, drawn by matplotlib's mathtext: no TeX and no network needed.

The same seed and index give the same bytes in any process, in any order and at any time, so that
a job which starts again sees the rows it saw before.
"""

import io
import logging
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from random import Random
from typing import TYPE_CHECKING, Any

from job import signals
from job.errors import SpecError
from job.prep.formulas import grammar
from job.spec.types import FormulasSpec

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LEFT = RIGHT = 4
"""Pixels that stay white beside a formula."""
TOP = BOTTOM = 2
"""Pixels that stay white above and below a formula."""
LONGEST = 2_000
"""Characters beyond which `render_latex` does not try: no page has room for the picture."""

_DRAWS_PER_LENGTH = 16  # formulas of one length to try before trying shorter ones
_CHUNK = 64  # samples that a worker draws at a time: about half a second
_WORTH_WORKERS = 512  # fewer samples are drawn sooner than processes start
# matplotlib's own defaults, said aloud: a matplotlibrc on the machine could hold others.
_SETTINGS = {"mathtext.default": "normal", "mathtext.fallback": "cm", "text.hinting": "default"}


@dataclass(frozen=True)
class FormulaSample:
    latex: str
    png: bytes


def samples(spec: FormulasSpec, count: int, workers: int) -> Iterator[FormulaSample]:
    """Samples 0 to `count`, in order, drawn by `workers` processes.

    Labels can repeat, as short ones do in any text.
    """
    if workers <= 1 or count < _WORTH_WORKERS:
        yield from (sample(spec, index) for index in range(count))
        return
    _typesetter()  # once, before the workers need it: it may build a cache of the machine's fonts
    starts = iter(range(0, count, _CHUNK))
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=signals.die_with_parent
    )
    try:
        # A few chunks ahead and no more: pictures would pile up before a slow consumer.
        running: deque[Future[list[FormulaSample]]] = deque()
        while True:
            while len(running) < 2 * workers and (start := next(starts, None)) is not None:
                running.append(pool.submit(_chunk, spec, start, min(start + _CHUNK, count)))
            if not running:
                return
            yield from running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunk(spec: FormulasSpec, start: int, stop: int) -> list[FormulaSample]:
    return [sample(spec, index) for index in range(start, stop)]


def sample(spec: FormulasSpec, index: int) -> FormulaSample:
    """The formula that `spec.seed` and `index` decide, and its picture as PNG.

    A formula that does not fit the canvas is drawn again, at the same length first, so that
    lengths stay evenly spread up to what the canvas holds.
    """
    rng = Random(f"formulas:{spec.seed}:{index}")  # noqa: S311  a text seed is hashed stably
    length = grammar.random_length(rng, spec.max_tokens)
    angle = rng.uniform(-spec.rotation, spec.rotation)
    while True:
        for _ in range(_DRAWS_PER_LENGTH):
            latex = grammar.to_latex(grammar.formula(rng, length))
            grey = _ink(latex, spec.math_fontfamily, spec.font_size, spec.dpi)
            assert grey is not None, f"mathtext cannot draw {latex}"
            canvas = _place(_rotate(grey, angle), spec.width, spec.height)
            if canvas is not None:
                return FormulaSample(latex, _encode(_add_noise(canvas, spec, index)))
            if grey.shape[1] > 2 * spec.width:
                break  # another formula of this length will not fit either
        if length <= grammar.SHORTEST:
            break
        length = rng.randrange(grammar.SHORTEST, length)
    raise SpecError(
        "formulas.width",
        f"no formula fits a canvas of {spec.width} × {spec.height} pixels at {spec.font_size:g} "
        f"points and {spec.dpi} dpi",
        value=spec.width,
        fix="raise formulas.width and formulas.height, or lower formulas.font_size",
    )


def render_latex(
    latex: str, math_fontfamily: str = "cm", font_size: float = 14, dpi: int = 110
) -> "Image | None":
    """The picture of any LaTeX at its own size; None where mathtext cannot draw it."""
    from PIL import Image

    grey = _ink(latex, math_fontfamily, font_size, dpi) if len(latex) <= LONGEST else None
    if grey is None:
        return None
    height, width = grey.shape
    canvas = _place(grey, width + LEFT + RIGHT, height + TOP + BOTTOM)
    assert canvas is not None, "the canvas was made for the formula"
    return Image.fromarray(canvas).convert("RGB")


def _ink(latex: str, math_fontfamily: str, size: float, dpi: int) -> "np.ndarray | None":
    """Black on white as grey bytes, cut to what is drawn; None where nothing can be drawn."""
    import numpy as np

    if "$" in latex.replace(r"\$", ""):
        return None  # mathtext would take what lies outside the dollars for prose
    parser, font = _typesetter(), _font(math_fontfamily, size)
    import matplotlib

    with _quiet(), matplotlib.rc_context(_SETTINGS):
        try:
            image = parser.parse(f"${latex}$", dpi=dpi, prop=font, antialiased=True).image
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError):
            # What fails halfway leaves the parser a flag that would add a space to its next
            # formula. One that succeeds clears it; a new parser has no cache to skip the work.
            type(parser)("agg").parse("$x$", prop=font)
            return None
    rows, columns = np.nonzero(np.asarray(image))
    if not len(rows):
        return None
    box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return 255 - np.asarray(box)


def _rotate(grey: "np.ndarray", angle: float) -> "np.ndarray":
    """Turned by `angle` degrees on a canvas that grows with it, then cut to what is drawn."""
    import numpy as np
    from PIL import Image

    if angle == 0:
        return grey
    turned = Image.fromarray(np.pad(grey, 2, constant_values=255)).rotate(
        angle, Image.Resampling.BICUBIC, expand=True, fillcolor=255
    )
    out = np.asarray(turned)
    rows, columns = np.nonzero(out < 250)
    return out[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _place(grey: "np.ndarray", width: int, height: int) -> "np.ndarray | None":
    """On a white canvas, at the left margin and half way up; None where it does not fit."""
    import numpy as np

    tall, wide = grey.shape
    if tall > height - TOP - BOTTOM or wide > width - LEFT - RIGHT:
        return None
    canvas = np.full((height, width), 255, np.uint8)
    top = (height - tall) // 2
    canvas[top : top + tall, LEFT : LEFT + wide] = grey
    return canvas


def _add_noise(canvas: "np.ndarray", spec: FormulasSpec, index: int) -> "np.ndarray":
    import numpy as np

    if spec.noise == 0:
        return canvas
    rng = np.random.default_rng((spec.seed, index))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(255 * spec.noise)
    return np.clip(np.rint(canvas + noise), 0, 255).astype(np.uint8)


def _encode(canvas: "np.ndarray") -> bytes:
    from PIL import Image

    out = io.BytesIO()
    # Level 1 takes a third of the usual time, and these files are no larger for it.
    Image.fromarray(canvas).convert("RGB").save(out, "PNG", compress_level=1)
    return out.getvalue()


@lru_cache(maxsize=1)
def _typesetter() -> Any:
    """mathtext's parser, imported and built with the first formula: a fifth of a second."""
    with _quiet():
        from matplotlib.mathtext import MathTextParser

        return MathTextParser("agg")


@lru_cache(maxsize=16)
def _font(math_fontfamily: str, size: float) -> Any:
    from matplotlib.font_manager import FontProperties

    # The family is the one that ships with matplotlib; the default could be the machine's.
    return FontProperties(family="DejaVu Sans", size=size, math_fontfamily=math_fontfamily)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps matplotlib from telling of its caches and of glyphs that a font lacks."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
