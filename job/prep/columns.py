"""Which column of a source holds what, by the spec or by the names that people use."""

from dataclasses import asdict, dataclass

from job.spec.types import ColumnsSpec


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A column that rows are read by and that is not there; `key` is its place in `columns`."""

    key: str
    column: str


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of one source by what they hold; `text` with `image` or `question`, or
    `messages`, or neither where `alpaca` says that its columns are there."""

    image: str | None
    text: str | None
    question: str | None
    """What is asked, in place of the instruction."""
    messages: str | None
    id: str | None
    alpaca: bool = False

    @classmethod
    def resolve(cls, spec: ColumnsSpec, present: tuple[str, ...]) -> "Columns | Missing":
        """The columns to read, or what is missing where the mapping cannot work."""
        for key, name in asdict(spec).items():
            if name is not None and name not in present:
                return Missing(key=key, column=name)

        def pick(named: str | None, *usual: str) -> str | None:
            return named or next((name for name in usual if name in present), None)

        columns = cls(
            image=pick(spec.image, "image", "images", "file_name"),
            text=None if spec.messages else pick(spec.text, "text", "label", "answer", "response"),
            question=pick(spec.question, "question", "query", "prompt"),
            messages=None if spec.text else pick(spec.messages, "messages", "conversations"),
            id=pick(spec.id, "id"),
            alpaca=not spec.text and {"instruction", "output"} <= set(present),
        )
        if columns.messages is not None or columns.alpaca:
            return columns
        if columns.text is None:
            return Missing(key="text", column="text")
        if columns.image is None and columns.question is None:
            # The instruction asks about an image: without one it trains nothing.
            return Missing(key="image", column="image")
        return columns
