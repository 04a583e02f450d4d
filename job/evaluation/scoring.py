"""Scores answers against labels, by kind of answer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from job.evaluation import answer_kinds, classes, fields, metrics, render_match
from job.evaluation.metrics import TextKind
from job.spec.answer_kinds import Answer


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of all answers."""

    metrics: dict[str, float]
    """The requested metrics that could be measured, by name."""
    counts: dict[str, int]
    """Numbers of rows that a metric excludes."""
    scores: tuple[dict[str, Any], ...]
    """Each answer's scores, by name."""
    details: dict[str, Any] = field(default_factory=dict)
    """For JSON, the scores by field; for labels, those by class and the confusion matrix."""
    renders: tuple[render_match.Outcome, ...] | None = None
    """The comparisons of rendered answers; None unless requested."""


def score_answers(
    kind: Answer, predictions: Sequence[str], labels: Sequence[str], wanted: Sequence[str]
) -> Scores:
    """Scores every answer against its label; `wanted` names metrics of the kind."""
    if kind == "label":
        return _labels(predictions, labels, wanted)
    if kind == "json":
        return _json(predictions, labels, wanted)
    return _text(kind, predictions, labels, wanted)


def _labels(predictions: Sequence[str], labels: Sequence[str], wanted: Sequence[str]) -> Scores:
    scored = classes.score(
        *([answer_kinds.text(each) for each in texts] for texts in (predictions, labels))
    )
    return Scores(
        metrics=_requested(scored.metrics, wanted),
        counts={},
        scores=tuple(asdict(score) for score in scored.scores),
        details={
            "classes": [{**asdict(each), "f1": each.f1} for each in scored.classes],
            "confusion": scored.confusion,
        },
    )


def _json(predictions: Sequence[str], labels: Sequence[str], wanted: Sequence[str]) -> Scores:
    scored = fields.score_all(predictions, labels)
    texts = _text("text", predictions, labels, [n for n in wanted if n not in fields.NAMES])
    invalid = sum(not each.label_is_json for each in scored.scores)
    return Scores(
        metrics=_requested({**scored.metrics, **texts.metrics}, wanted),
        counts={"labels_not_json": invalid} if invalid else {},
        scores=tuple(
            {**asdict(score), "exact_match": text["exact_match"], "cer": text["cer"]}
            for score, text in zip(scored.scores, texts.scores, strict=True)
        ),
        details={"fields": [{**asdict(each), "f1": each.f1} for each in scored.paths]},
    )


def _text(
    kind: TextKind, predictions: Sequence[str], labels: Sequence[str], wanted: Sequence[str]
) -> Scores:
    scores = [
        metrics.score(text, truth, kind) for text, truth in zip(predictions, labels, strict=True)
    ]
    text_metrics = [name for name in wanted if name != render_match.NAME]
    measured = asdict(metrics.summarize(scores, predictions, labels, text_metrics, kind))
    counts: dict[str, int] = {}
    renders = None
    if render_match.NAME in wanted:
        renders = tuple(map(render_match.compare, predictions, labels))
        counts = asdict(render_match.summarize(renders))
        measured[render_match.NAME] = counts.pop(render_match.NAME)
    del measured["rows"]
    return Scores(
        metrics={name: value for name, value in measured.items() if value is not None},
        counts=counts,
        scores=tuple(map(asdict, scores)),
        renders=renders,
    )


def _requested(measured: dict[str, float], wanted: Sequence[str]) -> dict[str, float]:
    return {name: value for name, value in measured.items() if name in wanted}
