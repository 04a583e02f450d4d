"""Charts of a training: as SVG for the report, as PNG for a README.

The SVG takes its colours from the page's style sheet, so that it follows dark mode and print.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_MOST_POINTS = 300  # more cannot be told apart at the width of a page
_SMOOTH_FROM = 24  # points; a shorter curve is its own trend
_WIDTH, _HEIGHT = 380, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 26

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart, its heading, and what it shows in words."""

    title: str
    words: str
    svg: str


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


def line_chart(title: str, values: Sequence[Point], *, unit: str = "", zero: bool = False) -> Chart:
    """A curve over steps; `zero` starts the axis there."""
    assert values, "a chart needs a point"
    curve = thin(values)
    trend = smooth(curve) if len(curve) >= _SMOOTH_FROM else []
    lows = [y for _, y in curve] + ([0.0] if zero else [])
    marks = ticks(min(lows), max(lows))
    x_low, x_high = curve[0][0], curve[-1][0]
    y_low, y_high = min(marks[0], *lows), max(marks[-1], *lows)

    def place(point: Point) -> str:
        across = (point[0] - x_low) / ((x_high - x_low) or 1)
        up = (point[1] - y_low) / ((y_high - y_low) or 1)
        x = _LEFT + across * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (1 - up) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    words = _words(title, values, unit)
    out = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_attribute(words)}">',
    ]
    for mark in marks:
        y = place((x_low, mark)).split(",")[1]
        out.append(f'<path class="grid" d="M{_LEFT},{y}H{_WIDTH - _RIGHT}"/>')
        out.append(
            f'<text x="{_LEFT - 6}" y="{y}" dy="0.35em" text-anchor="end">{number(mark)}</text>'
        )
    bottom = _HEIGHT - 7
    out.append(f'<text x="{_LEFT}" y="{bottom}">step {x_low:g}</text>')
    if x_high > x_low:
        out.append(f'<text x="{_WIDTH - _RIGHT}" y="{bottom}" text-anchor="end">{x_high:g}</text>')
    line = " ".join(map(place, curve))
    kind = "raw" if trend else "trend"
    if len(curve) == 1:
        x, y = line.split(",")
        out.append(f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>')
    else:
        out.append(f'<polyline class="{kind}" points="{line}"/>')
    if trend:
        out.append(f'<polyline class="trend" points="{" ".join(map(place, trend))}"/>')
    return Chart(title=title, words=words, svg="".join(out) + "</svg>")


def ticks(low: float, high: float) -> list[float]:
    """Three to six round values from below `low` to above `high`."""
    if high - low <= abs(high) * 1e-9:
        high, low = high + (abs(high) * 0.05 or 1), low - (abs(low) * 0.05 or 0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A value in the width of an axis: `5.4`, `12.5k`, `2e-04`."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def write_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws loss and learning rate over the steps as a PNG of 1600 × 720 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    loss = figure.add_subplot()
    rate = loss.twinx()
    curve, rates = thin(points(history, "loss")), thin(points(history, "learning_rate"))
    if len(curve) >= _SMOOTH_FROM:
        loss.plot(*zip(*curve, strict=True), color="#9db8dc", linewidth=1)
        curve = smooth(curve)
    if curve:
        loss.plot(*zip(*curve, strict=True), color="#1f5fae", linewidth=2.2)
    if rates:
        rate.plot(*zip(*rates, strict=True), color="#9a5b13", linewidth=1.3, linestyle="--")
    loss.set_xlabel("step")
    loss.set_ylabel("loss (solid)", color="#1f5fae")
    rate.set_ylabel("learning rate (dashed)", color="#9a5b13")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    loss.grid(axis="y", color="#e4e4e4")
    for axes in (loss, rate):
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.tick_params(length=0)
    figure.savefig(path, format="png", metadata={"Software": None})


def _words(title: str, values: Sequence[Point], unit: str) -> str:
    low, high = min(values, key=lambda p: p[1]), max(values, key=lambda p: p[1])
    first, last = values[0], values[-1]
    unit = f" {unit}" if unit else ""
    return (
        f"{title}: {number(first[1])}{unit} at step {first[0]:g}, "
        f"{number(last[1])}{unit} at step {last[0]:g}; lowest {number(low[1])} at step "
        f"{low[0]:g}, highest {number(high[1])} at step {high[0]:g}."
    )


def _attribute(text: str) -> str:
    return escape(text, {'"': "&quot;"})


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
