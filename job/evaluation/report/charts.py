"""The report's charts: training and validation over steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from job.evaluation.report.figure import Chart, Curve, Mark, Point, draw
from job.evaluation.report.headline import METRICS
from job.spec.answer_kinds import bare_metric

PREFIX = "eval_"
"""Of the validation's values in `history.jsonl`, as Transformers names them."""


def charts(
    history: Sequence[Mapping[str, Any]], validation: Mapping[str, Any] | None = None
) -> tuple[Chart, ...]:
    """The charts for which the history has values.

    `validation` is the training's summary of its validations: its metric, best step, and whether
    it stopped early; None without validation.
    """
    rate, memory = points(history, "learning_rate"), points(history, "memory_bytes", 2.0**-30)
    speed = points(history, "tokens_per_second")
    drawn = (
        *_quality(history, validation),
        draw("Learning rate", [Curve(name="learning rate", points=rate)], from_zero=True),
        *_rates_by_group(history),
        draw("Tokens per second", [Curve(name="speed", points=speed, trend=True)], from_zero=True),
        draw("Peak memory (GiB)", [Curve(name="memory", points=memory)], from_zero=True),
    )
    return tuple(chart for chart in drawn if chart is not None)


def _quality(
    history: Sequence[Mapping[str, Any]], validation: Mapping[str, Any] | None
) -> tuple[Chart | None, ...]:
    """The loss in training and validation, and the validated text metric if there is one."""
    loss = Curve(name="training", points=points(history, "loss"), trend=True)
    if validation is None:
        return (draw("Loss", [loss]),)
    held_out = validation_curve(history, "loss", name="validation")
    figures = [draw("Loss", [loss, held_out], marks=_marks("loss", held_out, validation))]
    if (metric := text_metric(history, validation)) is not None:
        curve = validation_curve(history, metric, name="validation")
        title = f"{METRICS[metric].name}, validation"
        figures.append(draw(title, [curve], marks=_marks(metric, curve, validation)))
    return tuple(figures)


def validation_curve(
    history: Sequence[Mapping[str, Any]], metric: str, *, name: str, color: str = "--second"
) -> Curve:
    """A metric of the validations over steps; no points if it was not measured."""
    values = points(history, PREFIX + metric)
    return Curve(name=name, points=values, color=color, dashes=(1.2, 1.2), dots=True)


def text_metric(
    history: Sequence[Mapping[str, Any]], validation: Mapping[str, Any] | None
) -> str | None:
    """The text metric to draw: the one that chose the best step, else the first measured."""
    chosen = bare_metric((validation or {}).get("metric"))
    measured = [name for name in METRICS if name != "loss" and points(history, PREFIX + name)]
    return chosen if chosen in measured else next(iter(measured), None)


def _marks(metric: str, curve: Curve, validation: Mapping[str, Any]) -> list[Mark]:
    """The best step, on the curve of any metric, and the stop if training ended early."""
    marks = []
    at = dict(curve.points)
    if (step := validation.get("best_step")) in at:
        chose = bare_metric(validation.get("metric")) == metric
        name = "best" if chose else "the best step"
        marks.append(Mark(name=name, step=step, value=at[step]))
    if validation.get("stopped_early") and curve.points:
        marks.append(Mark(name="stopped early", step=curve.points[-1][0]))
    return marks


def _rates_by_group(history: Sequence[Mapping[str, Any]]) -> list[Chart | None]:
    """A chart for each group of weights with a learning rate of its own."""
    by_step = [{**entry.get("learning_rates", {}), "step": entry.get("step")} for entry in history]
    groups = dict.fromkeys(name for entry in by_step for name in entry)
    return [
        draw(
            f"Learning rate of {name.replace('_', ' ')}",
            [Curve(name="learning rate", points=points(by_step, name))],
            from_zero=True,
        )
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
