"""The evaluation of one model: answers, scores, and the files that keep them."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from job import log
from job.evaluation import answer_lengths, classes, fields, render_match
from job.evaluation.generate import answer_rows
from job.evaluation.prompts import Question, questions
from job.evaluation.scoring import judge
from job.families.base import Family
from job.prep.rows import Row
from job.redaction import as_json
from job.spec.types import EvalSpec

EVAL = "eval"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer that was asked for, with the model's and its score."""

    id: str
    row: int
    """Number of the held-out row, from 0."""
    turn: int
    """Which answer of the row, from 1."""
    asked: list[dict[str, Any]]
    """The conversation before the answer; images by their number in the row."""
    label: str
    prediction: str
    cut_short: bool
    """Whether the answer reached the longest that was allowed."""
    score: dict[str, Any]
    render: render_match.Outcome | None = None
    """How the two pictures compare; None where the spec does not ask."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model on the held-out rows."""

    metrics: dict[str, float | int]
    """`loss`, `rows` and what the spec asks for, by name; `answers` where rows have several."""
    predictions: tuple[Prediction, ...]
    seconds: float
    tokens_per_second: float
    rows: int
    answer: str
    turns: str
    max_new_tokens: int
    cannot_be_right: int
    """Labels longer than that."""
    details: dict[str, Any] = field(default_factory=dict)
    """By field, or by class; see `job.evaluation.scoring`."""

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
    model: Any,
    family: Family,
    rows: Sequence[Row],
    spec: EvalSpec,
    *,
    batch_size: int,
    label: str,
) -> Evaluation:
    """Asks for the answers of the first `max_samples` rows and scores them."""
    chosen = [rows[i] for i in range(min(len(rows), spec.max_samples))]
    asked = questions(chosen, spec.turns)
    labels = [question.label for question in asked]
    _check(asked, spec)
    sizes = answer_lengths.tokens(family.processor.tokenizer, labels)
    most = answer_lengths.limit(spec.generation, sizes)
    hopeless = _warn_of_short_answers(sizes, most)
    started = time.monotonic()
    found = answer_rows(
        model,
        family,
        asked,
        chosen,
        replace(spec.generation, max_new_tokens=most),
        batch_size=batch_size,
        label=label,
    )
    seconds = time.monotonic() - started
    judged = judge(spec.answer, found.texts, labels, spec.measured)
    several = {"answers": len(asked)} if len(asked) != len(chosen) else {}
    return Evaluation(
        metrics={
            "loss": found.loss, "rows": len(chosen), **several, **judged.metrics, **judged.counts,
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
                render=None if judged.renders is None else judged.renders[number],
            )
            for number, (question, text, cut, score) in enumerate(
                zip(asked, found.texts, found.cut_short, judged.scores, strict=True)
            )
        ),
        seconds=round(seconds, 3),
        tokens_per_second=round(found.generated_tokens / max(seconds, 1e-9), 1),
        rows=len(chosen),
        answer=spec.answer,
        turns=spec.turns,
        max_new_tokens=most,
        cannot_be_right=hopeless,
        details=judged.details,
    )  # fmt: skip


def write(evaluation: Evaluation, directory: Path, name: str, predictions: str) -> None:
    """Writes `eval/<name>.json` and `eval/<predictions>`, one line an answer."""
    folder = directory / EVAL
    folder.mkdir(parents=True, exist_ok=True)
    summary = {**evaluation.summary(), **evaluation.details}
    (folder / f"{name}.json").write_text(as_json(summary, indent=2) + "\n", encoding="utf-8")
    with (folder / predictions).open("w", encoding="utf-8") as lines:
        for prediction in evaluation.predictions:
            lines.write(as_json(asdict(prediction)) + "\n")


def _check(asked: Sequence[Question], spec: EvalSpec) -> None:
    """Warns where labels are not what `eval.answer` says."""
    if spec.answer == "json":
        others = [each for each in asked if fields.parse(each.label) is fields.INVALID]
        if others:
            log.warn(
                "labels that are no JSON are left out of the metrics of fields",
                labels=log.of(len(others), len(asked)),
                first=others[0].id,
                fix="mend them, or set eval.answer: text",
            )
    elif spec.answer == "label":
        different = len({each.label for each in asked})
        if different > classes.MOST_CLASSES or (different > 20 and 2 * different > len(asked)):
            log.warn(
                "labels hardly repeat, so they are no classes to tell apart",
                different=log.of(different, len(asked)),
                fix="set eval.answer: text",
            )


def _warn_of_short_answers(sizes: Sequence[int], most: int) -> int:
    """How many labels are longer than an answer may become; warns where there are any."""
    hopeless = answer_lengths.too_long(sizes, most)
    if hopeless:
        log.warn(
            "answers are cut short: some labels are longer than eval.generation.max_new_tokens, "
            "so no answer to them can be right",
            cannot_be_right=log.of(hopeless, len(sizes)),
            max_new_tokens=most,
            longest_label=max(sizes),
            fix="set eval.generation.max_new_tokens: auto",
        )
    return hopeless
