"""Guesses the kind of answers (`eval.answer`) from sampled rows, with the reason."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from job.evaluation import answer_kinds, fields
from job.prep.rows import Row
from job.prep.splits import answers_repeat
from job.spec.answer_kinds import Answer

_LATEX = re.compile(r"\\[A-Za-z]+|[_^]\{")
_LABEL_CHARACTERS, _MOST_LABELS, _SHOWN_LABELS = 60, 100, 5
_FEWEST_ROWS = 6  # fewer do not show that answers repeat


@dataclass(frozen=True, kw_only=True)
class AnswerKind:
    """A guess; `reason` completes the sentence "The answers are compared as …: reason"."""

    kind: Answer
    reason: str
    labels: tuple[str, ...] = ()
    """The labels in the sample, the most frequent first."""


def guess(rows: Sequence[Row]) -> AnswerKind:
    """The kind of the rows' answers; `rows` must not be empty."""
    if any(sum(m.role == "assistant" for m in row.messages) > 1 for row in rows):
        return AnswerKind(kind="text", reason="rows are conversations with several answers")
    answers = [row.answer for row in rows]
    objects = sum(isinstance(fields.parse(answer), dict | list) for answer in answers)
    if 10 * objects >= 9 * len(answers):
        return AnswerKind(kind="json", reason=f"{_share(objects, answers)} are JSON")
    counts = Counter(map(answer_kinds.text, answers))
    if _are_labels(rows, counts):
        labels = tuple(label for label, _ in counts.most_common())
        shown = ", ".join(labels[:_SHOWN_LABELS]) + (", …" if len(labels) > _SHOWN_LABELS else "")
        return AnswerKind(
            kind="label",
            reason=f"the {len(answers)} sampled rows share {len(labels)} answers: {shown}",
            labels=labels,
        )
    formulas = sum(bool(_LATEX.search(answer)) for answer in answers)
    if 2 * formulas >= len(answers):
        return AnswerKind(kind="latex", reason=f"{_share(formulas, answers)} have LaTeX commands")
    return AnswerKind(kind="text", reason="they are neither JSON, nor LaTeX, nor a few labels")


def _are_labels(rows: Sequence[Row], counts: Counter[str]) -> bool:
    same_question = len({_question(row) for row in rows}) == 1
    short = all(len(answer) <= _LABEL_CHARACTERS for answer in counts)
    enough = len(rows) >= _FEWEST_ROWS and answers_repeat(counts.values())
    return same_question and short and enough and len(counts) <= _MOST_LABELS


def _question(row: Row) -> str:
    return "\0".join(message.text for message in row.prompt)


def _share(count: int, answers: Sequence[str]) -> str:
    total = len(answers)
    return f"all {total} sampled answers" if count == total else f"{count} of {total} sampled ones"
