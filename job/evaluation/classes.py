"""Classification metrics: answers are class labels.

| metric | unit | definition |
|---|---|---|
| `accuracy` | fraction of answers, 0 to 1 | the answer is the label, white space aside |
| `macro_f1` | 0 to 1 | unweighted mean of the classes' F1 |

The classes are the distinct held-out labels. An answer outside them is wrong and belongs to no
class: it only lowers the recall of its label's class. A class's F1 is twice its correct answers
divided by the number of answers and labels that name it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CLASSES = 200
"""With more distinct labels they are hardly classes: there is no confusion matrix."""


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """The score of one answer."""

    correct: bool


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """The counts of one class."""

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
class ClassScores:
    """The scores of all answers."""

    scores: tuple[LabelScore, ...]
    metrics: dict[str, float]
    classes: tuple[ClassCounts, ...]
    """Sorted by name."""
    confusion: tuple[tuple[int, ...], ...]
    """Counts by label (row) and answer (column); the last column counts answers outside the
    classes. Empty for more than `MAX_CLASSES`."""


def score(predictions: Sequence[str], labels: Sequence[str]) -> ClassScores:
    """Scores normalized predictions against normalized labels."""
    pairs = Counter(zip(labels, predictions, strict=True))
    names = sorted(set(labels))
    answered, expected = Counter(predictions), Counter(labels)
    classes = tuple(
        ClassCounts(
            name=name, right=pairs[name, name], answered=answered[name], expected=expected[name]
        )
        for name in names
    )
    confusion: list[tuple[int, ...]] = []
    for name in names if len(names) <= MAX_CLASSES else ():
        counts = [pairs[name, other] for other in names]
        confusion.append((*counts, expected[name] - sum(counts)))
    metrics = {}
    if labels:
        metrics = {
            "accuracy": sum(each.right for each in classes) / len(labels),
            "macro_f1": sum(each.f1 for each in classes) / len(classes),
        }
    return ClassScores(
        scores=tuple(LabelScore(correct=p == e) for p, e in zip(predictions, labels, strict=True)),
        metrics=metrics,
        classes=classes,
        confusion=tuple(confusion),
    )
