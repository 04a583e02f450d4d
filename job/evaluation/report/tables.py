"""Tables of scores: by field for JSON answers, by class with a confusion matrix for labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from job.evaluation import answer_kinds, classes, fields
from job.evaluation.report.samples import PredictionRecord
from job.spec.answer_kinds import Answer

MAX_LINES = 30
"""Maximum number of lines that are shown of a table."""
MAX_MATRIX = 12
"""With more classes, the most frequent confusions replace the matrix."""
_MAX_NAME = 60  # characters


@dataclass(frozen=True, kw_only=True)
class TaskLine:
    """A field or a class, with its F1."""

    name: str
    expected: int
    """Number of occurrences in the labels."""
    after: float
    """F1, 0 to 1."""
    before: float | None


@dataclass(frozen=True, kw_only=True)
class Cell:
    count: int
    share: float
    """Share of the labels in this row of the matrix."""
    right: bool


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """The confusion matrix after training."""

    names: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """By label; the last cell of each row counts answers outside the classes."""


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """A class, and an answer with which it was confused."""

    label: str
    answer: str | None
    """None for answers outside the classes."""
    count: int


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    kind: Literal["fields", "classes"]
    lines: tuple[TaskLine, ...]
    more: int
    """Lines that are not shown."""
    confusion: Confusion | None = None
    confused: tuple[ConfusedPair, ...] = ()
    """Shown instead of a matrix that would be too wide."""


def table(
    kind: Answer, before: Sequence[PredictionRecord], after: Sequence[PredictionRecord]
) -> TaskTable | None:
    """The table for this kind of answer; None if answers have neither fields nor classes."""
    if kind == "json":
        return _fields(before, after)
    return _classes(before, after) if kind == "label" else None


def _fields(
    before: Sequence[PredictionRecord], after: Sequence[PredictionRecord]
) -> TaskTable | None:
    now = fields.score_all(*_texts(after)).paths
    was = {each.path: each.f1 for each in fields.score_all(*_texts(before)).paths}
    lines = tuple(
        TaskLine(
            name=each.path[:_MAX_NAME] or "(root)",
            expected=each.expected,
            after=each.f1,
            before=was.get(each.path, 0.0) if before else None,
        )
        for each in now
    )
    if not lines:
        return None
    return TaskTable(kind="fields", lines=lines[:MAX_LINES], more=len(lines[MAX_LINES:]))


def _classes(
    before: Sequence[PredictionRecord], after: Sequence[PredictionRecord]
) -> TaskTable | None:
    now = _scored(after)
    was = {each.name: each.f1 for each in _scored(before).classes}
    lines = tuple(
        TaskLine(
            name=each.name[:_MAX_NAME],
            expected=each.expected,
            after=each.f1,
            before=was.get(each.name, 0.0) if before else None,
        )
        for each in now.classes
    )
    if not lines:
        return None
    narrow = len(now.classes) <= MAX_MATRIX
    return TaskTable(
        kind="classes",
        lines=lines[:MAX_LINES],
        more=len(lines[MAX_LINES:]),
        confusion=_matrix(now) if narrow else None,
        confused=() if narrow else _most_confused(now),
    )


def _scored(records: Sequence[PredictionRecord]) -> classes.ClassScores:
    predictions, labels = _texts(records)
    return classes.score(
        list(map(answer_kinds.text, predictions)), list(map(answer_kinds.text, labels))
    )


def _matrix(scores: classes.ClassScores) -> Confusion:
    names = [each.name for each in scores.classes]
    return Confusion(
        names=tuple(name[:_MAX_NAME] for name in names),
        rows=tuple(
            tuple(
                Cell(count=count, share=count / max(1, sum(counts)), right=column == number)
                for column, count in enumerate(counts)
            )
            for number, counts in enumerate(scores.confusion)
        ),
    )


def _most_confused(scores: classes.ClassScores) -> tuple[ConfusedPair, ...]:
    names = [*(each.name[:_MAX_NAME] for each in scores.classes), None]
    pairs = [
        ConfusedPair(label=str(names[number]), answer=names[column], count=count)
        for number, counts in enumerate(scores.confusion)
        for column, count in enumerate(counts)
        if count and column != number
    ]
    return tuple(sorted(pairs, key=lambda each: -each.count)[:MAX_LINES])


def _texts(records: Sequence[PredictionRecord]) -> tuple[list[str], list[str]]:
    return [str(row["prediction"]) for row in records], [str(row["label"]) for row in records]
