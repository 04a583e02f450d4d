"""The headline table: each metric before and after training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from job.evaluation.report.formatting import amount


@dataclass(frozen=True, kw_only=True)
class MetricKind:
    """What a metric is called, and how its values read."""

    name: str
    description: str
    higher_is_better: bool
    unit: str = ""
    """`%` for fractions, which are shown times 100."""
    top: float | None = None
    """The end of the scale; None means the larger of the two values."""


METRICS: Mapping[str, MetricKind] = {
    "loss": MetricKind(
        name="Loss", description="mean cross-entropy per answer token", higher_is_better=False
    ),
    "accuracy": MetricKind(
        name="Accuracy", description="answers equal to the label",
        higher_is_better=True, unit="%", top=1,
    ),
    "macro_f1": MetricKind(
        name="Macro F1", description="unweighted mean of the classes’ F1",
        higher_is_better=True, top=1,
    ),
    "valid_json": MetricKind(
        name="Valid JSON", description="answers that are valid JSON and nothing else",
        higher_is_better=True, unit="%", top=1,
    ),
    "exact_object": MetricKind(
        name="Exact object", description="answers whose JSON equals the label’s",
        higher_is_better=True, unit="%", top=1,
    ),
    "field_f1": MetricKind(
        name="Field F1", description="harmonic mean of field precision and recall",
        higher_is_better=True, top=1,
    ),
    "field_precision": MetricKind(
        name="Field precision", description="correct fields among the answers’",
        higher_is_better=True, unit="%", top=1,
    ),
    "field_recall": MetricKind(
        name="Field recall", description="correct fields among the labels’",
        higher_is_better=True, unit="%", top=1,
    ),
    "cer": MetricKind(
        name="Character error rate", description="edits per character of the label",
        higher_is_better=False,
    ),
    "exact_match": MetricKind(
        name="Exact match", description="answers identical to the label",
        higher_is_better=True, unit="%", top=1,
    ),
    "exact_match_normalized": MetricKind(
        name="Exact match, normalized", description="answers with the label’s normal form",
        higher_is_better=True, unit="%", top=1,
    ),
    "token_edit_distance": MetricKind(
        name="Token edit distance", description="edits per LaTeX token, on normal forms",
        higher_is_better=False,
    ),
    "wer": MetricKind(
        name="Word error rate", description="edits per word of the label",
        higher_is_better=False,
    ),
    "bleu": MetricKind(
        name="BLEU", description="BLEU-4 on normal forms, 0 to 100",
        higher_is_better=True, top=100,
    ),
    "render_match": MetricKind(
        name="Render match", description="answers that render to the label’s image",
        higher_is_better=True, unit="%", top=1,
    ),
}  # fmt: skip


Verdict = Literal["better", "worse", "equal"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of the table: the values as text, and their positions on a scale from 0 to 1."""

    key: str
    name: str
    description: str
    after: str
    after_position: float
    before: str | None = None
    before_position: float | None = None
    change: str | None = None
    verdict: Verdict | None = None
    note: str | None = None


def headline(before: Mapping[str, float] | None, after: Mapping[str, float]) -> tuple[Metric, ...]:
    """One row per measured metric, in a fixed order."""
    return tuple(
        _metric(key, kind, None if before is None else before.get(key), after)
        for key, kind in METRICS.items()
        if key in after
    )


def _metric(key: str, kind: MetricKind, before: float | None, after: Mapping[str, float]) -> Metric:
    value = after[key]
    end = kind.top or max(value, before or 0)
    comparison: dict[str, Any] = {}
    if before is not None:
        comparison = {
            "before": amount(before, kind.unit),
            "before_position": _position(before, end),
            "change": change(before, value, kind.unit),
            "verdict": verdict(kind, before, value),
        }
    note = None
    if key == "render_match":
        skipped, failed = int(after["render_skipped"]), int(after["render_failed"])
        note = f"{skipped:,} skipped (label cannot be rendered), {failed:,} failed (answer cannot)"
    return Metric(
        key=key, name=kind.name, description=kind.description, note=note,
        after=amount(value, kind.unit), after_position=_position(value, end), **comparison,
    )  # fmt: skip


def _position(value: float, end: float) -> float:
    """The value's position on a scale from 0 to `end`; 0 if it is not finite."""
    return min(1.0, max(0.0, value / end)) if end and math.isfinite(value / end) else 0.0


def verdict(kind: MetricKind, before: float, after: float) -> Verdict:
    """Whether `after` is better than `before`; NaN is worse than any number."""
    if after == before or (math.isnan(after) and math.isnan(before)):
        return "equal"
    if math.isnan(after) or math.isnan(before):
        return "worse" if math.isnan(after) else "better"
    return "better" if (after > before) == kind.higher_is_better else "worse"


def change(before: float, after: float, unit: str = "") -> str:
    """The difference with its sign: `+0.03`, `−12.5 pp`, `±0`."""
    difference = after - before
    if difference == 0:
        return "±0"
    sign = "+" if difference > 0 else "−"
    points = unit == "%"
    return f"{sign}{amount(abs(difference), unit).removesuffix(unit)}{'pp' if points else ''}"
