"""What a reward is: a function that scores answers against their references."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An answer to be scored."""

    answer: str
    """As the model wrote it, without special tokens."""
    reference: str
    """The row's own answer."""
    prompt: str | None
    """The question, with the text of the conversation before it; None if it is not kept."""
    row: int
    """Number of the row, from 0. Answers of one group have the same."""


Reward = Callable[[Sequence[Scored]], list[float]]
"""Scores answers: one value for each, from 0 (worst) to 1 (best). The same answers always get the
same values, so a resumed run learns what an uninterrupted one does."""


def each(score: Callable[[str, str], float]) -> Reward:
    """The reward that scores every answer by itself: `score(answer, reference)`."""

    def reward(answers: Sequence[Scored]) -> list[float]:
        return [float(score(item.answer, item.reference)) for item in answers]

    return reward
