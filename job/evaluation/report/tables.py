"""Tables of a task: fields of JSON answers, or classes and what they are taken for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from job.evaluation import answer_kinds, classes, fields
from job.spec.answer_kinds import Answer

MOST_LINES = 30
"""Lines of a table that are shown."""
WIDEST = 12
"""Classes that a confusion matrix shows side by side; of more, the pairs that are confused most."""
_LETTERS = 60

Prediction = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A field or a class, and how well it is answered."""

    name: str
    expected: int
    """Labels that have it."""
    after: float
    """F1, 0 to 1."""
    before: float | None


@dataclass(frozen=True, kw_only=True)
class Cell:
    count: int
    share: float
    """Of the row's labels."""
    right: bool


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """What the labels of each class were answered with, after training."""

    names: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """A row for each name; at the end of each what is none of them."""


@dataclass(frozen=True, kw_only=True)
class Confused:
    """A class that was taken for something else."""

    label: str
    answer: str | None
    """None is an answer that is no class."""
    count: int


@dataclass(frozen=True, kw_only=True)
class Table:
    kind: Literal["fields", "classes"]
    lines: tuple[Line, ...]
    more: int
    """Lines that are not shown."""
    confusion: Confusion | None = None
    confused: tuple[Confused, ...] = ()
    """In place of a matrix that would be too wide."""


def table(kind: Answer, before: Sequence[Prediction], after: Sequence[Prediction]) -> Table | None:
    """The table of the task; None where answers have neither fields nor classes."""
    if kind == "json":
        return _fields(before, after)
    return _classes(before, after) if kind == "label" else None


def _fields(before: Sequence[Prediction], after: Sequence[Prediction]) -> Table | None:
    now = fields.judge(*_texts(after)).paths
    was = {each.path: each.f1 for each in fields.judge(*_texts(before)).paths}
    lines = tuple(
        Line(
            name=each.path[:_LETTERS] or "the value itself",
            expected=each.expected,
            after=each.f1,
            before=was.get(each.path, 0.0) if before else None,
        )
        for each in now
    )
    if not lines:
        return None
    return Table(kind="fields", lines=lines[:MOST_LINES], more=len(lines[MOST_LINES:]))


def _classes(before: Sequence[Prediction], after: Sequence[Prediction]) -> Table | None:
    now = _judged(after)
    was = {each.name: each.f1 for each in _judged(before).classes}
    lines = tuple(
        Line(
            name=each.name[:_LETTERS],
            expected=each.expected,
            after=each.f1,
            before=was.get(each.name, 0.0) if before else None,
        )
        for each in now.classes
    )
    if not lines:
        return None
    narrow = len(now.classes) <= WIDEST
    return Table(
        kind="classes",
        lines=lines[:MOST_LINES],
        more=len(lines[MOST_LINES:]),
        confusion=_matrix(now) if narrow else None,
        confused=() if narrow else _most_confused(now),
    )


def _judged(found: Sequence[Prediction]) -> classes.ClassesJudged:
    predictions, labels = _texts(found)
    return classes.judge(
        list(map(answer_kinds.text, predictions)), list(map(answer_kinds.text, labels))
    )


def _matrix(judged: classes.ClassesJudged) -> Confusion:
    names = [each.name for each in judged.classes]
    return Confusion(
        names=tuple(name[:_LETTERS] for name in names),
        rows=tuple(
            tuple(
                Cell(count=count, share=count / max(1, sum(counts)), right=place == number)
                for place, count in enumerate(counts)
            )
            for number, counts in enumerate(judged.confusion)
        ),
    )


def _most_confused(judged: classes.ClassesJudged) -> tuple[Confused, ...]:
    names = [*(each.name[:_LETTERS] for each in judged.classes), None]
    found = [
        Confused(label=str(names[number]), answer=names[place], count=count)
        for number, counts in enumerate(judged.confusion)
        for place, count in enumerate(counts)
        if count and place != number
    ]
    return tuple(sorted(found, key=lambda each: -each.count)[:MOST_LINES])


def _texts(found: Sequence[Prediction]) -> tuple[list[str], list[str]]:
    return [str(row["prediction"]) for row in found], [str(row["label"]) for row in found]
