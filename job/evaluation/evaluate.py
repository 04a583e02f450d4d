"""The evaluation of one model: answers, scores, and the files that keep them."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.evaluation import render_match
from job.evaluation.generate import answer_rows
from job.evaluation.metrics import RowScore, score, summarize
from job.families.base import Family
from job.prep.records import Row
from job.redaction import as_json
from job.spec.types import EvalSpec

EVAL = "eval"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One held-out row with the model's answer and its score."""

    id: str
    label: str
    prediction: str
    score: RowScore
    render: render_match.Outcome | None = None
    """How the two pictures compare; None where the spec does not ask."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model on the held-out rows."""

    metrics: dict[str, float | int]
    """`loss` and what the spec asks for, by name."""
    predictions: tuple[Prediction, ...]
    seconds: float
    tokens_per_second: float

    def summary(self) -> dict[str, Any]:
        return {
            "metrics": self.metrics,
            "rows": len(self.predictions),
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
    """Answers the first `max_samples` rows and scores the answers."""
    chosen = [rows[i] for i in range(min(len(rows), spec.max_samples))]
    started = time.monotonic()
    answers = answer_rows(
        model, family, chosen, spec.generation, batch_size=batch_size, label=label
    )
    seconds = time.monotonic() - started
    labels = [row.answer for row in chosen]
    scores = [score(text, truth) for text, truth in zip(answers.texts, labels, strict=True)]
    of_texts = [name for name in spec.metrics if name != render_match.NAME]
    measured = asdict(summarize(scores, answers.texts, labels, of_texts))
    renders: list[render_match.Outcome | None] = [None] * len(chosen)
    if render_match.NAME in spec.metrics:
        outcomes = [render_match.compare(*pair) for pair in zip(answers.texts, labels, strict=True)]
        measured |= asdict(render_match.summarize(outcomes))
        renders = list(outcomes)
    metrics = {name: value for name, value in measured.items() if value is not None}
    return Evaluation(
        metrics={"loss": answers.loss, **metrics},
        predictions=tuple(
            Prediction(id=row.id, label=row.answer, prediction=text, score=row_score, render=render)
            for row, text, row_score, render in zip(
                chosen, answers.texts, scores, renders, strict=True
            )
        ),
        seconds=round(seconds, 3),
        tokens_per_second=round(answers.generated_tokens / max(seconds, 1e-9), 1),
    )


def write(evaluation: Evaluation, directory: Path, name: str, predictions: str) -> None:
    """Writes `eval/<name>.json` and `eval/<predictions>`, one line a row."""
    folder = directory / EVAL
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(
        as_json(evaluation.summary(), indent=2) + "\n", encoding="utf-8"
    )
    with (folder / predictions).open("w", encoding="utf-8") as lines:
        for prediction in evaluation.predictions:
            lines.write(as_json(asdict(prediction)) + "\n")
