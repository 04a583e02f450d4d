"""Which column of a record holds what, by the spec or by the names that people use."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from job.prep.values import is_absent
from job.spec.types import ColumnsSpec, DataSpec, SourceSpec

IMAGE = ("image", "images", "file_name")
TEXT = ("text", "label", "answer", "response", "output", "completion")
QUESTION = ("question", "query", "prompt", "instruction")
MESSAGES = ("messages", "conversations")


class Unclear(ValueError):
    """Several columns of a record could be what `key` of `columns` names."""

    def __init__(self, key: str, names: Iterable[str]) -> None:
        self.key, self.names = key, tuple(names)
        shown = " and ".join(f"`{name}`" for name in self.names)
        what = "the answer" if key == "text" else "the question"
        super().__init__(f"{shown} could each be {what}")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the records of one source become rows."""

    columns: ColumnsSpec
    instruction: str | None
    """Asked by rows that have no question of their own."""
    system: str | None
    """Of rows that have none of their own."""
    train_on: Literal["all", "last"]
    text_only: bool
    """Whether columns of images are not read."""
    allow_image_urls: bool

    @classmethod
    def of(cls, source: SourceSpec, data: DataSpec) -> "Reading":
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
    """The columns that one record is read by: `messages`, or `text` with `question` or `image`.

    Each names a key of the record, or is None.
    """

    image: str | None
    text: str | None
    question: str | None
    more: str | None
    """What stands below the question: Alpaca's `input`."""
    messages: str | None
    system: str | None
    history: str | None
    id: str | None

    @classmethod
    def of(
        cls, spec: ColumnsSpec, record: Mapping[str, object], *, text_only: bool = False
    ) -> "Columns":
        """The record's columns, a value that is null or empty counting as absent.

        Raises Unclear if several columns hold what could be the answer or the question.
        """
        filled = {name for name, value in record.items() if not is_absent(value)}

        def pick(named: str | None, usual: Iterable[str]) -> str | None:
            if named is not None:
                return named if named in record else None
            there = [name for name in usual if name in record]
            return next((name for name in there if name in filled), next(iter(there), None))

        def pick_one(key: str, named: str | None, usual: Iterable[str]) -> str | None:
            several = [name for name in usual if name in filled and isinstance(record[name], str)]
            if named is None and len(several) > 1:
                raise Unclear(key, several)
            return pick(named, several) or pick(named, usual)

        own = spec.text is not None or spec.question is not None
        messages = None if own else pick(spec.messages, MESSAGES)
        if messages is not None and messages not in filled and spec.messages is None:
            messages = None
        alpaca = not own and {"instruction", "output"} <= filled
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
            more="input" if question == "instruction" and "input" in record else None,
            messages=messages,
            system=pick(spec.system, ("system",)),
            history="history" if "history" in record else None,
            id=pick(spec.id, ("id",)),
        )

    @property
    def read(self) -> frozenset[str]:
        """The columns that are read."""
        found = vars(self).values()
        return frozenset(name for name in found if name is not None)
