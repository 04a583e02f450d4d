"""From a source's record to a row: `image` + `text` columns, or `messages`.

Accepted are the shapes people have: an OCR pair, where the instruction of the spec is the
question and `text` the answer, and a conversation whose content is text or a list of parts
(`{"type": "text", "text": …}`, `{"type": "image", "image": …}`), its images inline or in an
`image`/`images` column, taken in order.
"""

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from job.prep.images import ImageRefused, inspect
from job.prep.records import EncodedImage, Message, Part, Row
from job.spec.types import ColumnsSpec

MAX_TEXT = 100_000
IMAGE_PARTS = ("image", "image_url")
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}

Fetch = Callable[[str], bytes]
"""The bytes of an image by the path or URI that a record names; raises JobError or OSError."""


class RowRefused(ValueError):
    """The record cannot become a row; the text says why, for the list of rejects."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of one source by what they hold; `image` and `text`, or `messages`."""

    image: str | None
    text: str | None
    messages: str | None
    id: str | None

    @classmethod
    def resolve(cls, spec: ColumnsSpec, present: tuple[str, ...]) -> "Columns | str":
        """The columns to read, or the name of what is missing where the mapping cannot work."""
        for name in (spec.image, spec.text, spec.messages, spec.id):
            if name is not None and name not in present:
                return name

        def pick(named: str | None, *usual: str) -> str | None:
            return named or next((name for name in usual if name in present), None)

        columns = cls(
            image=pick(spec.image, "image", "images"),
            text=None if spec.messages else pick(spec.text, "text", "label", "answer"),
            messages=None if spec.text else pick(spec.messages, "messages"),
            id=pick(spec.id, "id"),
        )
        if columns.messages is not None:
            return columns
        if columns.text is None:
            return "text"
        return columns


def to_row(
    record: Mapping[str, object],
    columns: Columns,
    *,
    row_id: str,
    instruction: str,
    fetch: Fetch,
) -> Row:
    """The row that a record describes.

    Raises RowRefused where it describes none.
    """
    pictures = [_image(value, fetch) for value in _listed(record, columns.image)]
    if columns.messages is not None and record.get(columns.messages) is not None:
        messages, images = _conversation(record[columns.messages], pictures, fetch)
    else:
        messages, images = _pair(record, columns, pictures, instruction)
    if messages[-1].role != "assistant":
        raise RowRefused("the last message must be the assistant's")
    if not messages[-1].text.strip():
        raise RowRefused("the answer is empty")
    return Row(id=row_id, messages=tuple(messages), images=tuple(images))


def _pair(
    record: Mapping[str, object],
    columns: Columns,
    pictures: list[EncodedImage],
    instruction: str,
) -> tuple[list[Message], list[EncodedImage]]:
    assert columns.text is not None
    if columns.image is not None and not pictures:
        raise RowRefused(f"`{columns.image}` is empty")
    answer = _text(record.get(columns.text), f"`{columns.text}`")
    question = [Part(image=index) for index in range(len(pictures))] + [Part(text=instruction)]
    return [
        Message(role="user", parts=tuple(question)),
        Message(role="assistant", parts=(Part(text=answer),)),
    ], pictures


def _conversation(
    value: object, pictures: list[EncodedImage], fetch: Fetch
) -> tuple[list[Message], list[EncodedImage]]:
    if not isinstance(value, list) or not value:
        raise RowRefused("`messages` must be a list with at least one message")
    images: list[EncodedImage] = []
    waiting = iter(pictures)
    messages = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise RowRefused(f"{where} needs a role of system, user or assistant")
        parts = []
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
                inline = part.get("image", part.get("image_url"))
                if isinstance(inline, Mapping) and "url" in inline:
                    inline = inline["url"]
                if inline is not None:
                    image = _image(inline, fetch)
                else:
                    found = next(waiting, None)
                    if found is None:
                        raise RowRefused(f"{where} mentions more images than the row has")
                    image = found
                parts.append(Part(image=len(images)))
                images.append(image)
            else:
                text = part.get("text") if isinstance(part, Mapping) else part
                parts.append(Part(text=_text(text, where)))
        messages.append(Message(role=message["role"], parts=tuple(parts)))
    if next(waiting, None) is not None:
        raise RowRefused(f"the row has {len(pictures)} images and its messages mention fewer")
    return messages, images


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RowRefused(f"{where} must be text, found {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise RowRefused(f"{where} has {len(value)} characters, more than {MAX_TEXT}")
    return value


def _listed(record: Mapping[str, object], column: str | None) -> list[object]:
    value = record.get(column) if column else None
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _image(value: object, fetch: Fetch) -> EncodedImage:
    """An image given as bytes, as `{"bytes", "path"}`, as a data URL, or as a path or URI."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, bytes):
            return inspect(value)
        if isinstance(value, str) and value.startswith("data:"):
            return inspect(base64.b64decode(value.partition(",")[2], validate=True))
        if isinstance(value, str) and value:
            return inspect(fetch(value))
    except (ImageRefused, OSError) as error:
        named = f" ({value[:200]})" if isinstance(value, str) else ""
        raise RowRefused(f"{error}{named}") from error
    except binascii.Error as error:
        raise RowRefused(f"the data URL of an image is not base64: {error}") from error
    raise RowRefused(f"an image must be a path or bytes, found {type(value).__name__}")
