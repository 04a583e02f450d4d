"""Training curves as inline SVG, drawn by matplotlib.

Colors are variables of the page's style sheet, so that charts follow dark mode; text uses the
page's typeface. Output is deterministic.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

_MAX_POINTS = 300  # more would be indistinguishable at the page's width
_SMOOTH_FROM = 24  # points; shorter curves are not smoothed
_INCHES, _DPI = (4.4, 2.1), 100
# Placeholder colors for matplotlib, and the page's variables that replace them.
_COLORS = {"#010101": "var(--soft)", "#020202": "var(--line)", "#030303": "var(--accent)"}
_SOFT, _LINE, _ACCENT = _COLORS

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A curve with its title and description."""

    title: str
    description: str
    svg: Markup
    """Contains only numbers and this module's own text, so it needs no escaping."""


def charts(history: Sequence[Mapping[str, Any]]) -> tuple[Chart, ...]:
    """The charts for which the history has values."""
    rate, memory = points(history, "learning_rate"), points(history, "memory_bytes", 2.0**-30)
    speed = points(history, "tokens_per_second")
    drawn = (
        draw("Loss", points(history, "loss"), trend=True),
        draw("Learning rate", rate, from_zero=True),
        *_rates_by_group(history),
        draw("Tokens per second", speed, trend=True, from_zero=True),
        draw("Peak memory (GiB)", memory, from_zero=True),
    )
    return tuple(chart for chart in drawn if chart is not None)


def _rates_by_group(history: Sequence[Mapping[str, Any]]) -> list[Chart | None]:
    """A chart for each group of weights with a learning rate of its own."""
    by_step = [{**entry.get("learning_rates", {}), "step": entry.get("step")} for entry in history]
    groups = dict.fromkeys(name for entry in by_step for name in entry)
    return [
        draw(f"Learning rate of {name.replace('_', ' ')}", points(by_step, name), from_zero=True)
        for name in groups
        if name not in ("base", "step")
    ]


def points(history: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0) -> list[Point]:
    """(step, value) for the entries with a finite value."""
    pairs = [(entry.get("step"), entry.get(key)) for entry in history]
    return [
        (float(x), float(y) * scale)
        for x, y in pairs
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]


def thin(values: Sequence[Point]) -> list[Point]:
    """At most `_MAX_POINTS` points, each the mean of its neighbors."""
    if len(values) <= _MAX_POINTS:
        return list(values)
    bounds = [i * len(values) // _MAX_POINTS for i in range(_MAX_POINTS + 1)]
    groups = [values[start:stop] for start, stop in itertools.pairwise(bounds)]
    return [(_mean([x for x, _ in group]), _mean([y for _, y in group])) for group in groups]


def smooth(values: Sequence[Point]) -> list[Point]:
    """The bias-corrected exponential moving average over about a twentieth of the curve."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    out, total, weight = [], 0.0, 0.0
    for x, y in values:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def draw(
    title: str, values: Sequence[Point], *, trend: bool = False, from_zero: bool = False
) -> Chart | None:
    """A curve over steps; with `trend`, smoothed above the raw values. None without points."""
    if not values:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curve = thin(values)
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        x, y = zip(*curve, strict=True)
        if trend and len(curve) >= _SMOOTH_FROM:
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
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("step", color=_SOFT, loc="right", labelpad=1)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return Chart(
        title=title, description=_description(title, values), svg=_for_page(out.getvalue())
    )


def number(value: float) -> str:
    """A value short enough for an axis: `5.4`, `12.5k`, `2e-4`."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _for_page(svg: str) -> Markup:
    """The SVG element alone, with the page's colors, typeface and width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # would style the page
    width, height = (round(side * 72) for side in _INCHES)
    head = f'<svg viewBox="0 0 {width} {height}" aria-hidden="true" focusable="false"'
    svg = re.sub(r"<svg[^>]*?(?= xmlns=|>)[^>]*", head, svg, count=1)
    svg = svg.replace("xlink:href", "href")
    # matplotlib's ids would repeat for each curve.
    svg = re.sub(r' id="[a-z0-9.]+_[0-9]+"', "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    for placeholder, variable in _COLORS.items():
        svg = svg.replace(placeholder, variable)
    return Markup(re.sub(r"\n\s*", "\n", svg).strip())  # noqa: S704


def _description(title: str, values: Sequence[Point]) -> str:
    low, high = min(values, key=lambda p: p[1]), max(values, key=lambda p: p[1])
    first, last = values[0], values[-1]
    return (
        f"{title}: {number(first[1])} at step {first[0]:g}, {number(last[1])} at step "
        f"{last[0]:g}; lowest {number(low[1])} at step {low[0]:g}, "
        f"highest {number(high[1])} at step {high[0]:g}."
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
