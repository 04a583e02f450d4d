"""Renders LaTeX formulas to images with matplotlib's mathtext, without TeX or a network.

The same seed and index give the same bytes in any process and order, so a restarted job sees the
same rows.
"""

import io
import logging
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from random import Random
from typing import TYPE_CHECKING

from job import signals
from job.errors import SpecError
from job.prep.formulas import grammar
from job.spec.types import FormulasSpec

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.font_manager import FontProperties
    from PIL.Image import Image

LEFT = RIGHT = 4
"""White pixels beside a formula."""
TOP = BOTTOM = 2
"""White pixels above and below a formula."""
MAX_CHARACTERS = 2_000
"""Longest LaTeX that `render_latex` tries: no page has room for a longer one."""

_TRIES_PER_LENGTH = 16  # formulas of one length before trying shorter ones
_CHUNK = 64  # samples that a worker renders at a time: about half a second
_MIN_PARALLEL = 512  # fewer samples are rendered faster than processes start
# matplotlib's defaults, explicit as a matplotlibrc on the machine could override them.
_SETTINGS = {"mathtext.default": "normal", "mathtext.fallback": "cm"}


@dataclass(frozen=True)
class FormulaSample:
    latex: str
    png: bytes


def samples(spec: FormulasSpec, count: int, workers: int) -> Iterator[FormulaSample]:
    """Samples 0 to `count`, in order, rendered by `workers` processes.

    Short labels can repeat.
    """
    if workers <= 1 or count < _MIN_PARALLEL:
        yield from (sample(spec, index) for index in range(count))
        return
    render_latex("x")  # before the workers need it: it may build matplotlib's font cache
    starts = iter(range(0, count, _CHUNK))
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=signals.die_with_parent,
        initargs=(os.getpid(),),
    )
    try:
        # Only a few chunks ahead: images would pile up before a slow consumer.
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
    """The formula of `spec.seed` and `index`, and its image as PNG.

    A formula that does not fit the canvas is replaced, first by one of the same length, so that
    lengths stay uniform up to what fits.
    """
    rng = Random(f"formulas:{spec.seed}:{index}")  # noqa: S311  a text seed is hashed stably
    length = grammar.random_length(rng, spec.max_tokens)
    angle = rng.uniform(-spec.rotation, spec.rotation)
    while True:
        for _ in range(_TRIES_PER_LENGTH):
            latex = grammar.to_latex(grammar.formula(rng, length))
            grey = _ink(latex, spec.math_fontfamily, spec.font_size, spec.dpi)
            assert grey is not None, f"mathtext cannot render {latex}"
            canvas = _on_canvas(_rotate(grey, angle), spec.width, spec.height)
            if canvas is not None:
                return FormulaSample(latex, _encode(_add_noise(canvas, spec, index)))
            if grey.shape[1] > 2 * spec.width:
                break  # another formula of this length will not fit either
        if length <= grammar.MIN_TOKENS:
            break
        length = rng.randrange(grammar.MIN_TOKENS, length)
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
    """The image of any LaTeX at its natural size; None if mathtext cannot render it."""
    from PIL import Image

    grey = _ink(latex, math_fontfamily, font_size, dpi) if len(latex) <= MAX_CHARACTERS else None
    if grey is None:
        return None
    height, width = grey.shape
    canvas = _on_canvas(grey, width + LEFT + RIGHT, height + TOP + BOTTOM)
    assert canvas is not None, "the canvas has the size of the formula"
    return Image.fromarray(canvas).convert("RGB")


def _ink(latex: str, math_fontfamily: str, size: float, dpi: int) -> "np.ndarray | None":
    """The formula black on white, cropped, (H, W) grey bytes; None if it cannot be rendered."""
    import numpy as np

    if "$" in latex.replace(r"\$", ""):
        return None  # mathtext would render text outside the dollars as prose
    with _quiet(), _settings():
        from job.prep.formulas import mathtext  # a fifth of a second

        try:
            image = mathtext.draw(latex, _font(math_fontfamily, size), dpi)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError):
            return None
    rows, columns = np.nonzero(image)
    if not len(rows):
        return None
    box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return 255 - box


def _rotate(grey: "np.ndarray", angle: float) -> "np.ndarray":
    """Rotated by `angle` degrees on a larger canvas, then cropped."""
    import numpy as np
    from PIL import Image

    if angle == 0:
        return grey
    rotated = Image.fromarray(np.pad(grey, 2, constant_values=255)).rotate(
        angle, Image.Resampling.BICUBIC, expand=True, fillcolor=255
    )
    out = np.asarray(rotated)
    rows, columns = np.nonzero(out < 250)
    return out[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _on_canvas(grey: "np.ndarray", width: int, height: int) -> "np.ndarray | None":
    """Pastes (H, W) bytes on a white canvas, left and vertically centered; None if too large."""
    import numpy as np

    rows, columns = grey.shape
    if rows > height - TOP - BOTTOM or columns > width - LEFT - RIGHT:
        return None
    canvas = np.full((height, width), 255, np.uint8)
    top = (height - rows) // 2
    canvas[top : top + rows, LEFT : LEFT + columns] = grey
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
    # Level 1 takes a third of the time, and these files are no larger.
    Image.fromarray(canvas).convert("RGB").save(out, "PNG", compress_level=1)
    return out.getvalue()


@lru_cache(maxsize=16)
def _font(math_fontfamily: str, size: float) -> "FontProperties":
    from matplotlib.font_manager import FontProperties

    # A family that ships with matplotlib; the default may depend on the machine.
    return FontProperties(family="DejaVu Sans", size=size, math_fontfamily=math_fontfamily)


def _settings() -> AbstractContextManager[None]:
    """Sets what depends on a matplotlibrc; a context of matplotlib's copies all settings."""
    import matplotlib as mpl

    if all(mpl.rcParams[name] == value for name, value in _SETTINGS.items()):
        return nullcontext()
    return mpl.rc_context(_SETTINGS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences matplotlib's messages about caches and missing glyphs."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
