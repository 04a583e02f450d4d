"""Determines the role of each column of a record, from the spec or commonly used names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from job.prep.values import is_absent
from job.spec.types import ColumnsSpec, DataSpec, SourceSpec

IMAGE = ("image", "images", "file_name")
TEXT = ("text", "label", "answer", "response", "output", "completion")
QUESTION = ("question", "query", "prompt", "instruction")
MESSAGES = ("messages", "conversations")


class AmbiguousColumns(ValueError):
    """Several columns of a record could have the role `key` of `columns`."""

    def __init__(self, key: str, names: Iterable[str]) -> None:
        self.key, self.names = key, tuple(names)
        candidates = " and ".join(f"`{name}`" for name in self.names)
        role = "the answer" if key == "text" else "the question"
        super().__init__(f"{candidates} could each be {role}")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for converting the records of one source to rows."""

    columns: ColumnsSpec
    instruction: str | None
    """The question for rows without one."""
    system: str | None
    """The system prompt for rows without one."""
    train_on: Literal["all", "last"]
    text_only: bool
    """Whether image columns are ignored."""
    allow_image_urls: bool

    @classmethod
    def of(cls, source: SourceSpec, data: DataSpec) -> "ReadOptions":
        return cls(
            columns=source.columns,
            instruction=data.question_of(source),
            system=data.system,
            train_on=data.train_on,
            text_only=data.text_only,
            allow_image_urls=data.allow_image_urls,
        )


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of one record by role: `messages`, or `text` with `question` or `image`.

    Each is a key of the record, or None.
    """

    image: str | None
    text: str | None
    question: str | None
    input: str | None
    """Text to append to the question, as Alpaca's `input`."""
    messages: str | None
    system: str | None
    history: str | None
    id: str | None

    @classmethod
    def of(
        cls, spec: ColumnsSpec, record: Mapping[str, object], *, text_only: bool = False
    ) -> "Columns":
        """The record's columns; null and empty values count as absent.

        Raises AmbiguousColumns if several columns could be the answer or the question.
        """
        filled = {name for name, value in record.items() if not is_absent(value)}

        def pick(named: str | None, usual: Iterable[str]) -> str | None:
            if named is not None:
                return named if named in record else None
            present = [name for name in usual if name in record]
            return next((name for name in present if name in filled), next(iter(present), None))

        def pick_one(key: str, named: str | None, usual: Iterable[str]) -> str | None:
            several = [name for name in usual if name in filled and isinstance(record[name], str)]
            if named is None and len(several) > 1:
                raise AmbiguousColumns(key, several)
            return pick(named, several) or pick(named, usual)

        mapped = spec.text is not None or spec.question is not None
        messages = None if mapped else pick(spec.messages, MESSAGES)
        if messages is not None and messages not in filled and spec.messages is None:
            messages = None
        alpaca = not mapped and {"instruction", "output"} <= filled
        text: str | None
        question: str | None
        if messages is not None:
            text = question = None
        elif alpaca:
            text, question = "output", "instruction"
        else:
            text = pick_one("text", spec.text, TEXT)
            question = pick_one("question", spec.question, QUESTION)
            if question is None and spec.question is None and text not in (None, "text"):
                question = pick(None, ("input",))  # of `input` and `output`
        return cls(
            image=None if text_only else pick(spec.image, IMAGE),
            text=text,
            question=question,
            input="input" if question == "instruction" and "input" in record else None,
            messages=messages,
            system=pick(spec.system, ("system",)),
            history="history" if "history" in record else None,
            id=pick(spec.id, ("id",)),
        )

    @property
    def names(self) -> frozenset[str]:
        """The columns that are read."""
        return frozenset(name for name in vars(self).values() if name is not None)
