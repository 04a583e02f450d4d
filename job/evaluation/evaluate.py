"""Evaluates a model: generates answers, scores them, and writes the results."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import log
from job.evaluation import answer_lengths, classes, fields, render_match
from job.evaluation.generate import BatchSize, generate_answers
from job.evaluation.prompts import Question, questions
from job.evaluation.scoring import score_answers
from job.families.base import Family
from job.prep.rows import Row
from job.redaction import as_json
from job.spec.types import EvalSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVAL = "eval"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The model's answer to one question, with its score."""

    id: str
    row: int
    """Number of the held-out row, from 0."""
    turn: int
    """Number of the answer in the row, from 1."""
    asked: list[dict[str, Any]]
    """The conversation before the answer; images by their index in the row."""
    label: str
    prediction: str
    cut_short: bool
    """Whether the answer was truncated at max_new_tokens."""
    score: dict[str, Any]
    render: render_match.Outcome | None = None
    """The comparison of the rendered images; None unless render_match is measured."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model's results on the held-out rows."""

    metrics: dict[str, float | int]
    """`loss`, `rows`, the metrics that the spec names, and `answers` if rows have several."""
    predictions: tuple[Prediction, ...]
    seconds: float
    tokens_per_second: float
    rows: int
    answer: str
    turns: str
    max_new_tokens: int
    cannot_be_right: int
    """Number of labels longer than `max_new_tokens`."""
    details: dict[str, Any] = field(default_factory=dict)
    """Scores by field or by class; see `job.evaluation.scoring`."""

    def summary(self) -> dict[str, Any]:
        return {
            "metrics": self.metrics,
            "answer": self.answer,
            "turns": self.turns,
            "rows": self.rows,
            "answers": len(self.predictions),
            "max_new_tokens": self.max_new_tokens,
            "cut_short": sum(each.cut_short for each in self.predictions),
            "cannot_be_right": self.cannot_be_right,
            "seconds": self.seconds,
            "generated_tokens_per_second": self.tokens_per_second,
        }


def evaluate(
    model: "PreTrainedModel",
    family: Family,
    rows: Sequence[Row],
    spec: EvalSpec,
    *,
    batch_size: BatchSize,
    label: str,
) -> Evaluation:
    """Generates and scores answers to the first `max_samples` rows."""
    chosen = [rows[i] for i in range(min(len(rows), spec.max_samples))]
    asked = questions(chosen, spec.turns)
    labels = [question.label for question in asked]
    _check_labels(asked, spec)
    thinks = spec.generation.enable_thinking
    _check_thoughts(asked, thinks=thinks)
    written = [question.written(thinks=thinks) for question in asked]
    lengths = answer_lengths.tokens(family.processor.tokenizer, written)
    limit = answer_lengths.limit(spec.generation, lengths)
    too_long = _check_limit(lengths, limit)
    started = time.monotonic()
    answers = generate_answers(
        model,
        family,
        asked,
        chosen,
        replace(spec.generation, max_new_tokens=limit),
        batch_size=batch_size,
        label=label,
    )
    seconds = time.monotonic() - started
    scores = score_answers(spec.answer, answers.texts, labels, spec.measured)
    several = {"answers": len(asked)} if len(asked) != len(chosen) else {}
    return Evaluation(
        metrics={
            "loss": answers.loss, "rows": len(chosen), **several, **scores.metrics, **scores.counts,
        },
        predictions=tuple(
            Prediction(
                id=question.id,
                row=question.row,
                turn=question.turn,
                asked=question.to_json(),
                label=question.label,
                prediction=text,
                cut_short=cut,
                score=score,
                render=None if scores.renders is None else scores.renders[number],
            )
            for number, (question, text, cut, score) in enumerate(
                zip(asked, answers.texts, answers.cut_short, scores.scores, strict=True)
            )
        ),
        seconds=round(seconds, 3),
        tokens_per_second=round(answers.generated_tokens / max(seconds, 1e-9), 1),
        rows=len(chosen),
        answer=spec.answer,
        turns=spec.turns,
        max_new_tokens=limit,
        cannot_be_right=too_long,
        details=scores.details,
    )  # fmt: skip


def write(evaluation: Evaluation, directory: Path, name: str, predictions: str) -> None:
    """Writes `eval/<name>.json` and `eval/<predictions>`, one line per answer."""
    folder = directory / EVAL
    folder.mkdir(parents=True, exist_ok=True)
    summary = {**evaluation.summary(), **evaluation.details}
    (folder / f"{name}.json").write_text(as_json(summary, indent=2) + "\n", encoding="utf-8")
    with (folder / predictions).open("w", encoding="utf-8") as lines:
        for prediction in evaluation.predictions:
            lines.write(as_json(asdict(prediction)) + "\n")


def _check_labels(asked: Sequence[Question], spec: EvalSpec) -> None:
    """Warns if labels are not of the kind that `eval.answer` names."""
    if spec.answer == "json":
        invalid = [each for each in asked if fields.parse(each.label) is fields.INVALID]
        if invalid:
            log.warn(
                "labels that are not valid JSON are excluded from the field metrics",
                labels=log.fraction(len(invalid), len(asked)),
                first=invalid[0].id,
                fix="fix them, or set eval.answer: text",
            )
    elif spec.answer == "label":
        distinct = len({each.label for each in asked})
        if distinct > classes.MAX_CLASSES or (distinct > 20 and 2 * distinct > len(asked)):
            log.warn(
                "labels hardly repeat, so they are probably not classes",
                different=log.fraction(distinct, len(asked)),
                fix="set eval.answer: text",
            )


def _check_thoughts(asked: Sequence[Question], *, thinks: bool) -> None:
    """Warns if rows have thoughts, but the model is asked for answers without."""
    have = [question for question in asked if question.reasoning is not None]
    if have and not thinks:
        log.warn(
            "held-out answers have reasoning_content, but answers are generated without thoughts",
            answers=log.fraction(len(have), len(asked)),
            first=have[0].id,
            fix="set eval.generation.enable_thinking: true",
        )


def _check_limit(lengths: Sequence[int], limit: int) -> int:
    """The number of labels longer than the limit on answers; warns if there are any."""
    too_long = answer_lengths.too_long(lengths, limit)
    if too_long:
        log.warn(
            "answers are cut short: some labels are longer than eval.generation.max_new_tokens, "
            "so no answer to them can be right",
            cannot_be_right=log.fraction(too_long, len(lengths)),
            max_new_tokens=limit,
            longest_label=max(lengths),
            fix="set eval.generation.max_new_tokens: auto",
        )
    return too_long
