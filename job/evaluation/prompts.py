"""Questions from held-out rows: the turns before each answer of a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from job.prep.rows import EncodedImage, Message, Row


@dataclass(frozen=True, kw_only=True)
class Question:
    """The turns before an answer of a row, and the answer as the label."""

    id: str
    """The row's id."""
    row: int
    """Number of the row among those evaluated, from 0."""
    turn: int
    """Number of the answer in the row, from 1."""
    asked: tuple[Message, ...]
    """The conversation before the answer, with the labels of earlier answers."""
    images: tuple[EncodedImage, ...]
    """All images of the row; `asked` refers to some of them by index."""
    label: str
    """The row's answer."""
    reasoning: str | None = None
    """The thoughts before it."""

    def written(self, *, thinks: bool) -> str:
        """What a model writes that answers like the row: with the thoughts if it thinks."""
        return (self.reasoning or "") + self.label if thinks else self.label

    def to_json(self) -> list[dict[str, object]]:
        """The conversation before the answer, for `predictions.jsonl`."""
        return [message.to_json() for message in self.asked]


def questions(rows: Sequence[Row], turns: Literal["all", "last"]) -> list[Question]:
    """A question for every answer, or the last of each row; empty earlier answers are skipped."""
    result = []
    for number, row in enumerate(rows):
        answers = [index for index, each in enumerate(row.messages) if each.role == "assistant"]
        for turn, index in enumerate(answers, start=1):
            label = row.messages[index].text
            if index == answers[-1] or (turns == "all" and label.strip()):
                result.append(
                    Question(
                        id=row.id,
                        row=number,
                        turn=turn,
                        asked=row.messages[:index],
                        images=row.images,
                        label=label,
                        reasoning=row.messages[index].reasoning,
                    )
                )
    return result
