"""Curves of a training as SVG, drawn by matplotlib to stand inside the page.

Colours are names of the page's style sheet, so that a curve follows dark mode and print; words
are text in the page's own typeface; the same history gives the same bytes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_POINTS = 300  # more cannot be told apart at the width of a page
_SMOOTH_FROM = 24  # points; a shorter curve is its own trend
_INCHES, _DPI = (4.4, 2.1), 100
# Stand-ins that matplotlib accepts, and what the page calls them.
_COLOURS = {"#010101": "var(--soft)", "#020202": "var(--line)", "#030303": "var(--accent)"}
_SOFT, _LINE, _ACCENT = _COLOURS

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn curve, its heading, and what it shows in words."""

    title: str
    words: str
    svg: str


def charts(history: Sequence[Mapping[str, Any]]) -> tuple[Chart, ...]:
    """The curves that the history has values for."""
    wanted = (
        ("Loss", "loss", 1.0, "", False),
        ("Learning rate", "learning_rate", 1.0, "", True),
        ("Tokens a second", "tokens_per_second", 1.0, "", True),
        ("Peak memory, GiB", "memory_bytes", 2.0**-30, " GiB", True),
    )
    found = []
    for title, key, scale, unit, from_zero in wanted:
        values = points(history, key, scale)
        if values:
            found.append(draw(title, values, unit=unit, from_zero=from_zero))
    return tuple(found)


def points(history: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0) -> list[Point]:
    """(step, value) of the entries that have a finite value."""
    found = [(entry.get("step"), entry.get(key)) for entry in history]
    return [
        (float(x), float(y) * scale)
        for x, y in found
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]


def thin(values: Sequence[Point]) -> list[Point]:
    """At most `_MOST_POINTS` points, each the mean of its neighbours."""
    if len(values) <= _MOST_POINTS:
        return list(values)
    bounds = [i * len(values) // _MOST_POINTS for i in range(_MOST_POINTS + 1)]
    parts = [values[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    return [(_mean([x for x, _ in part]), _mean([y for _, y in part])) for part in parts]


def smooth(values: Sequence[Point]) -> list[Point]:
    """The running mean over about a tenth of the curve, started without a bias to zero."""
    keep = 1 - 1 / max(1.0, len(values) / 10)
    out, total, weight = [], 0.0, 0.0
    for x, y in values:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def draw(title: str, values: Sequence[Point], *, unit: str = "", from_zero: bool = False) -> Chart:
    """A curve over steps, with its trend where it has many points."""
    assert values, "a chart needs a point"
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    words = _words(title, values, unit)
    curve = thin(values)
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        x, y = zip(*curve, strict=True)
        if len(curve) >= _SMOOTH_FROM and title != "Learning rate":
            axes.plot(x, y, color=_SOFT, linewidth=0.8, alpha=0.55)
            x, y = zip(*smooth(curve), strict=True)
        axes.plot(
            x, y, color=_ACCENT, linewidth=2, solid_capstyle="round", marker="o", markersize=2.5,
            markevery=None if len(curve) < 12 else (len(curve) - 1, 1),
        )  # fmt: skip
        if from_zero:
            axes.set_ylim(bottom=0, top=max(value for _, value in curve) * 1.12 or 1)
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=_SOFT)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.yaxis.get_major_locator().set_params(nbins=5)
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("step", color=_SOFT, loc="right", labelpad=1)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return Chart(title=title, words=words, svg=_for_page(out.getvalue()))


def number(value: float) -> str:
    """A value in the width of an axis: `5.4`, `12.5k`, `2e-4`."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _for_page(svg: str) -> str:
    """The drawing alone, in the page's colours and type, at the width that the page gives it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # it would style the page
    width, height = (round(side * 72) for side in _INCHES)
    head = f'<svg viewBox="0 0 {width} {height}" aria-hidden="true" focusable="false"'
    svg = re.sub(r"<svg[^>]*?(?= xmlns=|>)[^>]*", head, svg, count=1)
    svg = svg.replace("xlink:href", "href")
    # Names that only matplotlib reads would stand on the page once for each curve.
    svg = re.sub(r' id="[a-z0-9.]+_[0-9]+"', "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    for stand_in, name in _COLOURS.items():
        svg = svg.replace(stand_in, name)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _words(title: str, values: Sequence[Point], unit: str) -> str:
    low, high = min(values, key=lambda p: p[1]), max(values, key=lambda p: p[1])
    first, last = values[0], values[-1]
    return (
        f"{title}: {number(first[1])}{unit} at step {first[0]:g}, "
        f"{number(last[1])}{unit} at step {last[0]:g}; lowest {number(low[1])} at step "
        f"{low[0]:g}, highest {number(high[1])} at step {high[0]:g}."
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
