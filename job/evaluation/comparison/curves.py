"""The runs' curves in one figure for each quantity."""

from collections.abc import Sequence

from job.evaluation.comparison.stored_run import StoredRun
from job.evaluation.report.charts import points, text_metric, validation_curve
from job.evaluation.report.figure import RUN_COLORS, WIDE, Chart, Curve, Mark, draw
from job.evaluation.report.headline import METRICS

_DASHES: Sequence[tuple[float, ...]] = ((), (6, 1.5), (6, 1.5, 1.2, 1.5), (12, 2))
"""They tell runs apart whose colors repeat."""


def curves(runs: Sequence[StoredRun]) -> tuple[Chart, ...]:
    """Training and validation loss of all runs, then the validated text metrics."""
    training = [
        Curve(
            name=f"{run.letter} training",
            points=points(run.history, "loss"),
            color=_color(number),
            dashes=_DASHES[number // len(RUN_COLORS) % len(_DASHES)],
            trend=True,
        )
        for number, run in enumerate(runs)
    ]
    held_out, marks = _validated(runs, "loss")
    figures = [draw("Loss", [*training, *held_out], marks=marks, named=True, size=WIDE)]
    for metric in METRICS:
        if metric == "loss" or metric not in map(_text_metric, runs):
            continue
        lines, marks = _validated(runs, metric)
        title = f"{METRICS[metric].name}, validation"
        figures.append(draw(title, lines, marks=marks, named=True, size=WIDE))
    return tuple(chart for chart in figures if chart is not None)


def _validated(runs: Sequence[StoredRun], metric: str) -> tuple[list[Curve], list[Mark]]:
    """Each run's validations, and a ring at its best step."""
    lines, marks = [], []
    for number, run in enumerate(runs):
        name = f"{run.letter} validation"
        curve = validation_curve(run.history, metric, name=name, color=_color(number))
        best = run.validation.get("best_step")
        at = dict(curve.points)
        lines.append(curve)
        if best in at:
            mark = Mark(name=f"{run.letter} best", step=best, value=at[best], color=_color(number))
            marks.append(mark)
    return lines, marks


def _text_metric(run: StoredRun) -> str | None:
    return text_metric(run.history, run.validation)


def _color(number: int) -> str:
    return RUN_COLORS[number % len(RUN_COLORS)]
