"""Answers that are labels, one of a few classes: how many are right, and what is taken for what.

| metric | unit | definition |
|---|---|---|
| `accuracy` | share of answers, 0 to 1 | the answer is the label; white space around them aside |
| `macro_f1` | share, 0 to 1 | the mean of the classes' F1, each weighing the same |

The classes are those of the held-out labels. An answer that is none of them is wrong and belongs to
no class: it counts against the recall of its label's class alone. F1 of a class is twice its right
answers by the answers and the labels that name it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MOST_CLASSES = 200
"""Classes that are told apart in the confusion matrix; a set of more is no set of classes."""


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """One answer against its label."""

    correct: bool


@dataclass(frozen=True, kw_only=True)
class Class:
    """One class of the labels."""

    name: str
    right: int
    answered: int
    """Answers that name it."""
    expected: int
    """Labels that name it."""

    @property
    def f1(self) -> float:
        return 2 * self.right / max(1, self.answered + self.expected)


@dataclass(frozen=True, kw_only=True)
class ClassesJudged:
    """All answers together."""

    scores: tuple[LabelScore, ...]
    metrics: dict[str, float]
    classes: tuple[Class, ...]
    """Sorted by name."""
    confusion: tuple[tuple[int, ...], ...]
    """A row for each class of labels: how many answers name each class, and at the end none of
    them. Empty for more than `MOST_CLASSES`."""


def judge(predictions: Sequence[str], labels: Sequence[str]) -> ClassesJudged:
    """Scores every answer; predictions and labels are in their normal form."""
    pairs = Counter(zip(labels, predictions, strict=True))
    names = sorted(set(labels))
    answered, expected = Counter(predictions), Counter(labels)
    classes = tuple(
        Class(name=name, right=pairs[name, name], answered=answered[name], expected=expected[name])
        for name in names
    )
    confusion: list[tuple[int, ...]] = []
    for name in names if len(names) <= MOST_CLASSES else ():
        among = [pairs[name, other] for other in names]
        confusion.append((*among, expected[name] - sum(among)))
    metrics = {}
    if labels:
        metrics = {
            "accuracy": sum(each.right for each in classes) / len(labels),
            "macro_f1": sum(each.f1 for each in classes) / len(classes),
        }
    return ClassesJudged(
        scores=tuple(LabelScore(correct=p == e) for p, e in zip(predictions, labels, strict=True)),
        metrics=metrics,
        classes=classes,
        confusion=tuple(confusion),
    )
