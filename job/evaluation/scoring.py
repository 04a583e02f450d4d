"""Answers against labels, by the kind of answer: scores a row, metrics, and what tables show."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from job.evaluation import answer_kinds, classes, fields, metrics, render_match
from job.evaluation.metrics import Written
from job.spec.answer_kinds import Answer


@dataclass(frozen=True, kw_only=True)
class Judged:
    """All answers against their labels."""

    metrics: dict[str, float]
    """Those that were asked for and can be measured, by name."""
    counts: dict[str, int]
    """Rows that a metric leaves out."""
    scores: tuple[dict[str, Any], ...]
    """What is known of each answer, by name."""
    details: dict[str, Any] = field(default_factory=dict)
    """Of JSON the fields, of labels the classes and their confusion matrix."""
    renders: tuple[render_match.Outcome, ...] | None = None
    """How the drawn answers compare; None where the spec does not ask."""


def judge(
    kind: Answer, predictions: Sequence[str], labels: Sequence[str], wanted: Sequence[str]
) -> Judged:
    """Compares every answer with its label; `wanted` names metrics that fit the kind."""
    if kind == "label":
        return _labels(predictions, labels, wanted)
    if kind == "json":
        return _json(predictions, labels, wanted)
    return _written(kind, predictions, labels, wanted)


def _labels(predictions: Sequence[str], labels: Sequence[str], wanted: Sequence[str]) -> Judged:
    found = classes.judge(
        *([answer_kinds.text(each) for each in texts] for texts in (predictions, labels))
    )
    return Judged(
        metrics=_chosen(found.metrics, wanted),
        counts={},
        scores=tuple(asdict(score) for score in found.scores),
        details={
            "classes": [{**asdict(each), "f1": each.f1} for each in found.classes],
            "confusion": found.confusion,
        },
    )


def _json(predictions: Sequence[str], labels: Sequence[str], wanted: Sequence[str]) -> Judged:
    found = fields.judge(predictions, labels)
    texts = _written("text", predictions, labels, [n for n in wanted if n not in fields.NAMES])
    unknown = sum(not each.label_is_json for each in found.scores)
    return Judged(
        metrics=_chosen({**found.metrics, **texts.metrics}, wanted),
        counts={"labels_not_json": unknown} if unknown else {},
        scores=tuple(
            {**asdict(of_fields), "exact_match": of_text["exact_match"], "cer": of_text["cer"]}
            for of_fields, of_text in zip(found.scores, texts.scores, strict=True)
        ),
        details={"fields": [{**asdict(each), "f1": each.f1} for each in found.paths]},
    )


def _written(
    kind: Written, predictions: Sequence[str], labels: Sequence[str], wanted: Sequence[str]
) -> Judged:
    scores = [
        metrics.score(text, truth, kind) for text, truth in zip(predictions, labels, strict=True)
    ]
    of_texts = [name for name in wanted if name != render_match.NAME]
    measured = asdict(metrics.summarize(scores, predictions, labels, of_texts, kind))
    counts: dict[str, int] = {}
    renders = None
    if render_match.NAME in wanted:
        renders = tuple(map(render_match.compare, predictions, labels))
        drawn = asdict(render_match.summarize(renders))
        measured[render_match.NAME] = drawn.pop(render_match.NAME)
        counts = drawn
    del measured["rows"]
    return Judged(
        metrics={name: value for name, value in measured.items() if value is not None},
        counts=counts,
        scores=tuple(map(asdict, scores)),
        renders=renders,
    )


def _chosen(measured: dict[str, float], wanted: Sequence[str]) -> dict[str, float]:
    return {name: value for name, value in measured.items() if name in wanted}
