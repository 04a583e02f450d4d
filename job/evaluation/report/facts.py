"""The figures of a report: metrics before and after, how far off the rows are, times, settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from job import log
from job.artifacts.records import StageRecord
from job.evaluation.report.samples import Prediction, cer


@dataclass(frozen=True, kw_only=True)
class _Kind:
    name: str
    words: str
    higher_is_better: bool
    unit: str = ""
    """`%` for shares of 1, which are shown times 100."""
    top: float | None = None
    """Where the scale ends; None ends it at the larger value."""


_METRICS = {
    "loss": _Kind(
        name="Loss", words="mean cross-entropy of an answer’s token", higher_is_better=False
    ),
    "accuracy": _Kind(
        name="Accuracy", words="the answer is the label", higher_is_better=True, unit="%", top=1,
    ),
    "macro_f1": _Kind(
        name="Macro F1", words="mean of the classes’ F1, each weighing the same",
        higher_is_better=True, top=1,
    ),
    "valid_json": _Kind(
        name="Valid JSON", words="the answer is JSON, and nothing else",
        higher_is_better=True, unit="%", top=1,
    ),
    "exact_object": _Kind(
        name="Exact object", words="the answer is the label’s value, field by field",
        higher_is_better=True, unit="%", top=1,
    ),
    "field_f1": _Kind(
        name="Field F1", words="harmonic mean of precision and recall of fields",
        higher_is_better=True, top=1,
    ),
    "field_precision": _Kind(
        name="Field precision", words="of the answers’ fields, those that are right",
        higher_is_better=True, unit="%", top=1,
    ),
    "field_recall": _Kind(
        name="Field recall", words="of the labels’ fields, those that were found",
        higher_is_better=True, unit="%", top=1,
    ),
    "cer": _Kind(
        name="Character error rate", words="edits per character of the label",
        higher_is_better=False,
    ),
    "exact_match": _Kind(
        name="Exact match", words="the answer is the label, sign for sign",
        higher_is_better=True, unit="%", top=1,
    ),
    "exact_match_normalized": _Kind(
        name="Exact match, normalised", words="both have the same normal form",
        higher_is_better=True, unit="%", top=1,
    ),
    "token_edit_distance": _Kind(
        name="Token edit distance", words="edits per LaTeX token of the normal forms",
        higher_is_better=False,
    ),
    "wer": _Kind(
        name="Word error rate", words="edits per word of the label",
        higher_is_better=False,
    ),
    "bleu": _Kind(
        name="BLEU", words="four-grams of the normal forms’ tokens, 0 to 100",
        higher_is_better=True, top=100,
    ),
    "render_match": _Kind(
        name="Render match", words="both draw the same picture",
        higher_is_better=True, unit="%", top=1,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Count:
    """Rows or answers, apart from how good they are."""

    name: str
    words: str
    value: str


Verdict = Literal["better", "worse", "equal"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One line of the headline: the values as text, and where they stand on a scale from 0 to 1."""

    key: str
    name: str
    words: str
    after: str
    after_at: float
    before: str | None = None
    before_at: float | None = None
    change: str | None = None
    verdict: Verdict | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Band:
    """How many rows are within a range of edit rates, and as a share of all."""

    name: str
    after: int
    after_share: float
    before: int | None
    before_share: float


@dataclass(frozen=True, kw_only=True)
class StageTime:
    name: str
    started: str
    took: str
    share: float
    """Of all stages together, 0 to 1."""
    before: float
    """The share of the stages before it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    path: str
    value: str
    changed: bool


def headline(before: Mapping[str, float] | None, after: Mapping[str, float]) -> tuple[Metric, ...]:
    """A line for each metric that was measured, in a fixed order."""
    return tuple(
        _metric(key, kind, None if before is None else before.get(key), after)
        for key, kind in _METRICS.items()
        if key in after
    )


def _metric(key: str, kind: _Kind, before: float | None, after: Mapping[str, float]) -> Metric:
    value = after[key]
    end = kind.top or max(value, before or 0)
    found: dict[str, Any] = {}
    if before is not None:
        better = value > before if kind.higher_is_better else value < before
        found = {
            "before": amount(before, kind.unit),
            "before_at": _place(before, end),
            "change": _change(before, value, kind.unit),
            "verdict": "equal" if value == before else "better" if better else "worse",
        }
    note = None
    if key == "render_match":
        skipped, failed = int(after["render_skipped"]), int(after["render_failed"])
        note = f"{skipped:,} skipped (label cannot be drawn), {failed:,} failed (answer cannot)"
    return Metric(
        key=key, name=kind.name, words=kind.words, note=note,
        after=amount(value, kind.unit), after_at=_place(value, end), **found,
    )  # fmt: skip


def amount(value: float, unit: str = "") -> str:
    """A value as a table shows it: `6.28`, `0.412`, `0.002`, `12.5 %`."""
    if unit == "%":
        return f"{100 * value:.{1 if value else 0}f}\u202f%"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def _place(value: float, end: float) -> float:
    """Where the value stands on a scale from 0 to `end`; at 0 where it is no number."""
    return min(1.0, max(0.0, value / end)) if end and math.isfinite(value / end) else 0.0


def _change(before: float, after: float, unit: str) -> str:
    difference = after - before
    if difference == 0:
        return "±0"
    sign = "+" if difference > 0 else "−"
    points = unit == "%"
    return f"{sign}{amount(abs(difference), unit).removesuffix(unit)}{'pp' if points else ''}"


def counts(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> tuple[Count, ...]:
    """What was asked and what came of it, in rows and answers; from the stages' summaries."""
    metrics = after["metrics"]
    rows = int(after.get("rows", metrics.get("rows", 0)))
    answers = int(after.get("answers", rows))
    found = [Count(name="Rows judged", words="", value=f"{rows:,}")]
    if answers != rows:
        found.append(
            Count(name="Answers asked for", words="of conversations", value=f"{answers:,}")
        )
    if "max_new_tokens" in after:
        cut = f"{after['cut_short']:,}"
        if before is not None and "cut_short" in before:
            cut = f"{before['cut_short']:,} → {cut}"
        words = f"answers of {after['max_new_tokens']:,} tokens, the most allowed"
        found.append(Count(name="Cut short", words=words, value=cut))
    if after.get("cannot_be_right"):
        words = "labels longer than any answer may become"
        found.append(
            Count(name="Cannot be right", words=words, value=f"{after['cannot_be_right']:,}")
        )
    if metrics.get("labels_not_json"):
        words = "left out of the metrics of fields"
        value = f"{int(metrics['labels_not_json']):,}"
        found.append(Count(name="Labels that are no JSON", words=words, value=value))
    return tuple(found)


_BANDS = (
    ("0", 0.0),
    ("to 0.1", 0.1),
    ("to 0.3", 0.3),
    ("to 0.6", 0.6),
    ("to 1", 1.0),
    ("over 1", math.inf),
)


def bands(before: Sequence[Prediction], after: Sequence[Prediction]) -> tuple[Band, ...]:
    """Rows by their character error rate; `before` is empty where there is no baseline."""

    def count(found: Sequence[Prediction], low: float, high: float) -> int:
        return sum(low < cer(row) <= high for row in found)

    out = []
    low = -1.0
    for name, high in _BANDS:
        now, was = count(after, low, high), count(before, low, high)
        out.append(
            Band(
                name=name,
                after=now,
                after_share=now / max(1, len(after)),
                before=was if before else None,
                before_share=was / max(1, len(before)),
            )
        )
        low = high
    return tuple(out)


def times(stages: Mapping[str, StageRecord]) -> tuple[StageTime, ...]:
    """When each stage started and how long it took, in the order they ran."""
    total = sum(stage.seconds for stage in stages.values()) or 1
    out, before = [], 0.0
    for stage in stages.values():
        share = stage.seconds / total
        out.append(
            StageTime(
                name=stage.name,
                started=stage.started.replace("T", " ").removesuffix("Z"),
                took=log.duration(stage.seconds),
                share=share,
                before=before,
            )
        )
        before += share
    return tuple(out)


def settings(
    resolved: Mapping[str, Any], changed: Sequence[str], sections: Sequence[str]
) -> tuple[Setting, ...]:
    """Every key of the sections with its value, in the spec's order."""
    marked = set(changed)
    out: list[Setting] = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, inner in enumerate(value):
                walk(inner, f"{path}[{number}]")
        else:
            out.append(Setting(path=path, value=_spelled(value), changed=path in marked))

    for section in sections:
        walk(resolved[section], section)
    return tuple(out)


def _spelled(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_spelled, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
