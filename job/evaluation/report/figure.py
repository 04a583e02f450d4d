"""Draws curves over steps as inline SVG, by matplotlib.

Colors are variables of the page's style sheet, so that figures follow dark mode; text uses the
page's typeface. Output is deterministic.
"""

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_POINTS = 300  # more would be indistinguishable at the page's width
_SMOOTH_FROM = 24  # points; shorter curves are not smoothed
_DPI = 100
SMALL, WIDE = (4.4, 2.1), (7.2, 3.0)
"""Sizes of figures, in inches of 72 page pixels."""
RUN_COLORS = tuple(f"--run-{number}" for number in range(1, 7))
"""The variables of the colors that tell runs apart; they repeat with other dashes."""
_VARIABLES = ("--soft", "--line", "--accent", "--second", *RUN_COLORS)
# Placeholder colors for matplotlib, which the page's variables replace.
_PLACEHOLDERS = {name: f"#{n:02x}{n:02x}{n:02x}" for n, name in enumerate(_VARIABLES, start=1)}

Point = tuple[float, float]
"""(step, value)"""


@dataclass(frozen=True, kw_only=True)
class Curve:
    name: str
    points: Sequence[Point]
    color: str = "--accent"
    """A variable of the page."""
    trend: bool = False
    """Draws the smoothed curve above the raw values."""
    dashes: Sequence[float] = ()
    dots: bool = False
    """Marks every point, because there are few."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A step to point out: a ring at its value or, without a value, a vertical line."""

    name: str
    step: float
    value: float | None = None
    color: str = "--second"


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of the legend."""

    name: str
    color: str
    kind: str
    """`line`, `dashes`, `dots`, `ring` or `stop`."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with its title, description and legend."""

    title: str
    description: str
    svg: Markup
    """Contains only numbers and this module's own text, so it needs no escaping."""
    legend: tuple[Key, ...] = ()
    """Empty for a single curve, which the title names."""


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
    title: str,
    curves: Sequence[Curve],
    *,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    named: bool = False,
    size: tuple[float, float] = SMALL,
) -> Chart | None:
    """The curves in one figure; those without points are left out. None if none has points.

    `named` gives also a single curve its name; by default the title names it.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for curve in curves:
            _draw_curve(axes, curve)
        for mark in marks:
            _draw_mark(axes, mark)
        if from_zero:
            top = max(value for curve in curves for _, value in thin(curve.points))
            axes.set_ylim(bottom=0, top=top * 1.12 or 1)
        _draw_axes(axes)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    several = named or len(curves) > 1
    return Chart(
        title=title,
        description=_description(title, curves if several else curves[0], marks),
        svg=_for_page(out.getvalue(), size),
        legend=tuple(
            [*map(_key_of_curve, curves), *map(_key_of_mark, marks)] if several or marks else ()
        ),
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


def _draw_curve(axes: "Axes", curve: Curve) -> None:
    points = thin(curve.points)
    color = _PLACEHOLDERS[curve.color]
    x, y = zip(*points, strict=True)
    if curve.trend and len(points) >= _SMOOTH_FROM:
        raw = _PLACEHOLDERS["--soft"] if curve.color == "--accent" else color
        alpha = 0.55 if curve.color == "--accent" else 0.25
        axes.plot(x, y, color=raw, linewidth=0.8, alpha=alpha)
        x, y = zip(*smooth(points), strict=True)
    every = curve.dots or len(points) < 12
    [drawn] = axes.plot(
        x, y, color=color, linewidth=1.8 if curve.dashes else 2, solid_capstyle="round",
        marker="o", markersize=2.5, markevery=None if every else (len(points) - 1, 1),
    )  # fmt: skip
    if curve.dashes:
        drawn.set_dashes(list(curve.dashes))


def _draw_mark(axes: "Axes", mark: Mark) -> None:
    color = _PLACEHOLDERS[mark.color]
    if mark.value is None:
        axes.axvline(mark.step, color=_PLACEHOLDERS["--soft"], linewidth=1, linestyle=(0, (2, 2)))
    else:
        axes.plot(
            [mark.step], [mark.value], color=color, marker="o", markersize=9,
            markerfacecolor="none", markeredgewidth=1.6, clip_on=False,
        )  # fmt: skip


def _draw_axes(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    soft, line = _PLACEHOLDERS["--soft"], _PLACEHOLDERS["--line"]
    axes.grid(axis="y", color=line, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=soft)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("step", color=soft, loc="right", labelpad=1)


def _key_of_curve(curve: Curve) -> Key:
    kind = "dots" if curve.dots else "dashes" if curve.dashes else "line"
    return Key(name=curve.name, color=curve.color, kind=kind)


def _key_of_mark(mark: Mark) -> Key:
    if mark.value is None:
        return Key(name=f"{mark.name}: step {mark.step:,.0f}", color="--soft", kind="stop")
    text = f"{mark.name}: {number(mark.value)} at step {mark.step:,.0f}"
    return Key(name=text, color=mark.color, kind="ring")


def _for_page(svg: str, size: tuple[float, float]) -> Markup:
    """The SVG element alone, with the page's colors, typeface and width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # would style the page
    width, height = (round(side * 72) for side in size)
    head = f'<svg viewBox="0 0 {width} {height}" aria-hidden="true" focusable="false"'
    svg = re.sub(r"<svg[^>]*?(?= xmlns=|>)[^>]*", head, svg, count=1)
    svg = svg.replace("xlink:href", "href")
    # matplotlib's ids would repeat for each curve.
    svg = re.sub(r' id="[a-z0-9.]+_[0-9]+"', "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    for variable, placeholder in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return Markup(re.sub(r"\n\s*", "\n", svg).strip())  # noqa: S704


def _description(title: str, curves: Curve | Sequence[Curve], marks: Sequence[Mark]) -> str:
    """The text alternative: each curve's ends and extremes, then the marks."""
    if isinstance(curves, Curve):
        parts = [f"{title}: {_course(curves.points)}"]
    else:
        parts = [f"{title}.", *(f"{curve.name}: {_course(curve.points)}" for curve in curves)]
    return " ".join([*parts, *(f"{_key_of_mark(mark).name}." for mark in marks)])


def _course(values: Sequence[Point]) -> str:
    low, high = min(values, key=lambda p: p[1]), max(values, key=lambda p: p[1])
    first, last = values[0], values[-1]
    return (
        f"{number(first[1])} at step {first[0]:g}, {number(last[1])} at step "
        f"{last[0]:g}; lowest {number(low[1])} at step {low[0]:g}, "
        f"highest {number(high[1])} at step {high[0]:g}."
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
