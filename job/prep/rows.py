"""A training row as the rest of the job sees it: a conversation and its images.

Images stay encoded until a batch is built. The answer is the last message, the assistant's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a message: text, or an index into the row's images."""

    text: str | None = None
    image: int | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    role: Role
    parts: tuple[Part, ...]
    train: bool = True
    """Whether the message is trained; only the assistant's can be."""
    reasoning: str | None = None
    """The thoughts before an answer of the assistant: never blank."""

    @property
    def text(self) -> str:
        """The message's text without its images."""
        return "".join(part.text for part in self.parts if part.text is not None)

    def to_json(self) -> dict[str, object]:
        """Role, content and thoughts as chat templates take them; images by their index in the
        row."""
        return {
            "role": self.role,
            **({} if self.reasoning is None else {"reasoning_content": self.reasoning}),
            "content": [
                {"type": "text", "text": part.text}
                if part.image is None
                else {"type": "image", "image": part.image}
                for part in self.parts
            ],
        }


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image file's bytes and its size in pixels, upright."""

    data: bytes
    width: int
    height: int
    difference_hash: bytes = field(default=bytes(32), compare=False, repr=False)
    """256 bits, nearly equal for images that look the same; see `job.prep.dedup`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example; `id` says where it came from (`train.jsonl:12`)."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[EncodedImage, ...]
    ignored: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Columns and keys of its record that prep ignores; not stored with it."""
    given_system: bool = field(default=False, compare=False, repr=False)
    """Whether its system prompt is the spec's; not stored with it."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Every message before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last message."""
        return self.messages[-1].text

    @property
    def thinks(self) -> bool:
        """Whether its answer has thoughts, so that it is trained as one of a model that thinks."""
        return self.messages[-1].reasoning is not None

    def without_image_bytes(self) -> "Row":
        """The row with the sizes of its images but not their bytes."""
        return replace(self, images=tuple(replace(image, data=b"") for image in self.images))

    def to_record(self) -> dict[str, object]:
        """The row as columns of a shard."""
        return {
            "id": self.id,
            "messages": json.dumps(
                [
                    {**message.to_json(), **({} if message.train else {"train": False})}
                    for message in self.messages
                ],
                ensure_ascii=False,
            ),
            "images": [
                {"bytes": image.data, "width": image.width, "height": image.height}
                for image in self.images
            ],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> "Row":
        """The inverse of `to_record`."""
        messages, images = record["messages"], record["images"]
        assert isinstance(messages, str)
        assert isinstance(images, list)
        return cls(
            id=str(record["id"]),
            messages=tuple(
                Message(
                    role=message["role"],
                    parts=tuple(
                        Part(text=part.get("text"), image=part.get("image"))
                        for part in message["content"]
                    ),
                    train=message.get("train", True),
                    reasoning=message.get("reasoning_content"),
                )
                for message in json.loads(messages)
            ),
            images=tuple(
                EncodedImage(data=image["bytes"], width=image["width"], height=image["height"])
                for image in images
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A record that cannot become a row, and why."""

    id: str
    reason: str


class RowRefused(ValueError):
    """The record cannot become a row; the text is the reason of the reject."""
