"""Metrics and figures of training, run by run."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from job import log
from job.evaluation import render_match
from job.evaluation.comparison.answers import HeldOut, by_key
from job.evaluation.comparison.stored_run import StoredRun
from job.evaluation.report.formatting import amount
from job.evaluation.report.headline import METRICS, MetricKind, Verdict, change, verdict
from job.evaluation.scoring import score_answers
from job.spec.answer_kinds import bare_metric


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """A metric of one run before and after training; None for what was not measured."""

    before: float | None
    after: float | None
    best: bool
    """Whether it is the best value after training; several if equal, none if all are."""

    def text(self, kind: MetricKind) -> str:
        return "–" if self.after is None else amount(self.after, kind.unit)

    def before_text(self, kind: MetricKind) -> str:
        return "–" if self.before is None else amount(self.before, kind.unit)

    def change(self, kind: MetricKind) -> tuple[str, Verdict] | None:
        """The change by training, and whether it is for the better."""
        if self.before is None or self.after is None:
            return None
        return change(self.before, self.after, kind.unit), verdict(kind, self.before, self.after)

    def against(self, other: "MetricValue", kind: MetricKind) -> tuple[str, Verdict] | None:
        """The difference from another run after training."""
        if self.after is None or other.after is None:
            return None
        return change(other.after, self.after, kind.unit), verdict(kind, other.after, self.after)


@dataclass(frozen=True, kw_only=True)
class MetricLine:
    key: str
    kind: MetricKind
    values: tuple[MetricValue, ...]
    """By run."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of training or data, by run."""

    key: str
    name: str
    values: tuple[float | str | None, ...]
    texts: tuple[str, ...]


def metrics(runs: Sequence[StoredRun], *, comparable: bool) -> tuple[MetricLine, ...]:
    """The metrics that any run measured; the best is marked if the rows are `comparable`."""
    lines = []
    for key, kind in METRICS.items():
        before, after = (
            [run.metrics.get(when, {}).get(key) for run in runs] for when in ("baseline", "final")
        )
        if any(value is not None for value in (*before, *after)):
            lines.append(_line(key, kind, before, after, comparable=comparable))
    return tuple(lines)


def common_metrics(runs: Sequence[StoredRun], rows: HeldOut) -> tuple[MetricLine, ...]:
    """The text metrics after training on the rows that all runs have, scored again."""
    having = [run for run in runs if run.answers]
    measured = [set(run.metrics.get("final", {})) for run in having]
    wanted = [
        key
        for key in METRICS
        if key not in ("loss", render_match.NAME) and all(key in each for each in measured)
    ]
    scored: list[Mapping[str, float]] = []
    for run in runs:
        if not run.answers or not wanted:
            scored.append({})
            continue
        answers = [by_key(run)[key] for key in rows.common]
        texts, labels = (
            [str(each.get(name, "")) for each in answers] for name in ("prediction", "label")
        )
        scored.append(score_answers(run.kind or "text", texts, labels, wanted).metrics)
    none = [None] * len(runs)
    return tuple(
        _line(key, METRICS[key], none, [each.get(key) for each in scored], comparable=True)
        for key in wanted
    )


def _line(
    key: str,
    kind: MetricKind,
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    comparable: bool,
) -> MetricLine:
    finite = [value for value in after if value is not None and math.isfinite(value)]
    best = None
    if comparable and len(finite) > 1 and min(finite) != max(finite):
        best = max(finite) if kind.higher_is_better else min(finite)
    values = tuple(
        MetricValue(before=was, after=now, best=best is not None and now == best)
        for was, now in zip(before, after, strict=True)
    )
    return MetricLine(key=key, kind=kind, values=values)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _from_train(key: str) -> Callable[[StoredRun], object]:
    return lambda run: run.train.get(key)


def _from_rows(key: str) -> Callable[[StoredRun], object]:
    return lambda run: run.rows.get(key)


def _best_value(run: StoredRun) -> str | None:
    found = run.validation
    if found.get("best") is None:
        return None
    metric = bare_metric(found.get("metric"))
    kind = METRICS.get(metric)
    return f"{amount(float(found['best']), kind.unit if kind else '')} {metric}"


_FIGURES: Sequence[
    tuple[str, str, Callable[[StoredRun], object], Callable[[float], str] | None]
] = (
    ("steps", "Steps", _from_train("steps"), _whole),
    ("epochs", "Epochs", _from_train("epochs"), lambda value: f"{value:.3g}"),
    ("best_step", "Best step", lambda run: run.validation.get("best_step"), _whole),
    ("best_validation", "Best validation", _best_value, None),
    ("exported_step", "Step of the results", lambda run: run.validation.get("exported_step"),
     _whole),
    ("first_loss", "Training loss, first", _from_train("first_loss"), amount),
    ("final_loss", "Training loss, last", _from_train("final_loss"), amount),
    ("tokens", "Tokens", _from_train("tokens"), _whole),
    ("tokens_per_second", "Tokens per second", _from_train("tokens_per_second"), _whole),
    ("mfu", "MFU", _from_train("mfu"), lambda value: f"{value:.1%}"),
    ("seconds", "Training time", _from_train("seconds"), log.duration),
    ("stage_seconds", "Time of all stages",
     lambda run: sum(each.seconds for each in run.stages.values()) or None, log.duration),
    ("peak_memory_bytes", "Peak memory", _from_train("peak_memory_bytes"), log.size),
    ("processes", "Processes", _from_train("processes"), _whole),
    ("rows_a_step", "Rows per step", _from_train("rows_a_step"), _whole),
    ("trainable_parameters", "Trainable parameters", _from_train("trainable_parameters"), _whole),
    ("train_rows", "Training rows", _from_rows("train"), _whole),
    ("validation_rows", "Validation rows", _from_rows("validation"), _whole),
    ("eval_rows", "Held-out rows", _from_rows("eval"), _whole),
    ("rejected_rows", "Rejected rows", _from_rows("rejected"), _whole),
    ("leaked_rows", "Leaked rows", _from_rows("leaked"), _whole),
    ("dropped_rows", "Rows too long to train", _from_rows("dropped_over_max_length"), _whole),
)  # fmt: skip


def figures(runs: Sequence[StoredRun]) -> tuple[Figure, ...]:
    """The figures that any run has."""
    made = []
    for key, name, value_of, format_value in _FIGURES:
        values = tuple(_number_or_text(value_of(run)) for run in runs)
        if all(value is None for value in values):
            continue
        texts = tuple(_text(value, format_value) for value in values)
        made.append(Figure(key=key, name=name, values=values, texts=texts))
    return tuple(made)


def _number_or_text(value: object) -> float | str | None:
    return value if isinstance(value, int | float | str) else None


def _text(value: float | str | None, format_value: Callable[[float], str] | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, str) or format_value is None else format_value(value)
