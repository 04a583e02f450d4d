"""What a model is asked of held-out rows: each answer of a conversation, with all before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from job.prep.rows import EncodedImage, Message, Row


@dataclass(frozen=True, kw_only=True)
class Question:
    """One answer of a row, to be given anew."""

    id: str
    """The row's."""
    row: int
    """Number of the row among those that are judged, from 0."""
    turn: int
    """Which answer of the row it is, from 1."""
    asked: tuple[Message, ...]
    """The conversation before the answer; earlier answers are the true ones."""
    images: tuple[EncodedImage, ...]
    """All of the row; `asked` mentions some of them, by their numbers."""
    label: str
    """The true answer."""

    def to_json(self) -> list[dict[str, Any]]:
        """The conversation before the answer, for `predictions.jsonl`."""
        return [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    if part.image is None
                    else {"type": "image", "image": part.image}
                    for part in message.parts
                ],
            }
            for message in self.asked
        ]


def questions(rows: Sequence[Row], turns: Literal["all", "last"]) -> list[Question]:
    """Every answer of the rows, or the last of each; an earlier one that is empty asks nothing."""
    found = []
    for number, row in enumerate(rows):
        places = [at for at, message in enumerate(row.messages) if message.role == "assistant"]
        for turn, place in enumerate(places, start=1):
            answer = row.messages[place].text
            if place == places[-1] or (turns == "all" and answer.strip()):
                found.append(
                    Question(
                        id=row.id,
                        row=number,
                        turn=turn,
                        asked=row.messages[:place],
                        images=row.images,
                        label=answer,
                    )
                )
    return found
