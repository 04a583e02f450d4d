"""From a source's record to a row: `image` + `text` columns, a conversation, or Alpaca columns.

Accepted are the shapes people have: an OCR pair, where the instruction of the spec is the
question and `text` the answer; a `question` with its answer; a conversation whose content is text
or a list of parts (`{"type": "text", "text": …}`, `{"type": "image", "image": …}`), its images
inline or in an `image`/`images` column, taken in order; ShareGPT's turns of `from` and `value`, and
Alpaca's `instruction`, `input` and `output`, where `<image>` stands for the next image.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping

from job.prep.columns import Columns
from job.prep.images import ImageRefused, inspect
from job.prep.records import EncodedImage, Message, Part, Role, Row
from job.redaction import redact

MAX_TEXT = 100_000
IMAGE_PARTS = ("image", "image_url")
ROLES: dict[object, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
MARK = "<image>"
"""Where ShareGPT's and Alpaca's texts have an image."""
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_PICTURES = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")

Fetch = Callable[[str], bytes]
"""The bytes of an image by the path or URI that a record names; raises JobError or OSError."""


class RowRefused(ValueError):
    """The record cannot become a row; the text says why, for the list of rejects."""


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
    elif columns.alpaca and record.get("output") is not None:
        messages, images = _conversation(_alpaca(record, len(pictures)), pictures, fetch)
    elif columns.question is not None and record.get(columns.question) is not None:
        messages, images = _conversation(_asked(record, columns, len(pictures)), pictures, fetch)
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
    if columns.text is None:
        raise RowRefused(f"`{columns.messages or 'output'}` is empty")
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
    marked = any(MARK in str(_said(message)) for message in value)
    messages = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in ROLES:
            raise RowRefused(f"{where} needs a role of system, user or assistant")
        parts = []
        content = _said(message)
        if isinstance(content, str) and pictures and ROLES[role] == "user":
            if "from" in message and not marked and not images:
                content = MARK * len(pictures) + content
            if MARK in content:
                content = _marked(content)
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
                inline = _inline(part)
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
        messages.append(Message(role=ROLES[role], parts=tuple(parts)))
    if next(waiting, None) is not None:
        raise RowRefused(f"the row has {len(pictures)} images and its messages mention fewer")
    return messages, images


def named_images(record: Mapping[str, object], columns: Columns) -> Iterator[object]:
    """What a record gives as images, in its column and its turns: paths, bytes or structs."""
    yield from _listed(record, columns.image)
    turns = record.get(columns.messages) if columns.messages is not None else None
    for turn in turns if isinstance(turns, list) else []:
        content = _said(turn)
        for part in content if isinstance(content, list) else []:
            if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
                yield _inline(part)


def _inline(part: Mapping[object, object]) -> object:
    """The image that a part of a turn holds; None where it stands for the next of the column."""
    inline = part.get("image", part.get("image_url"))
    return inline["url"] if isinstance(inline, Mapping) and "url" in inline else inline


def _said(message: object) -> object:
    """A turn's content, as `content` or as ShareGPT's `value`."""
    if not isinstance(message, Mapping):
        return None
    return message.get("content", message.get("value"))


def _marked(text: str) -> list[object]:
    """Text with marks as parts: what lies between them, and an image for each."""
    first, *rest = text.split(MARK)
    parts: list[object] = [first] if first.strip() else []
    for each in rest:
        parts.append({"type": "image"})
        if each.strip():
            parts.append(each.lstrip("\n"))
    return parts


def _alpaca(record: Mapping[str, object], pictures: int) -> list[object]:
    """Alpaca's columns as turns: `system`, `history`, then `instruction` with `input` below it."""
    turns: list[tuple[str, object]] = []
    if record.get("system"):
        turns.append(("system", record["system"]))
    history = record.get("history")
    for pair in history if isinstance(history, list) else []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRefused("`history` must hold pairs of a question and its answer")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    question, more = record.get("instruction"), record.get("input")
    if isinstance(question, str) and isinstance(more, str) and more:
        question = f"{question}\n{more}"
    turns += [("user", question), ("assistant", record.get("output"))]
    if pictures and not any(MARK in str(said) for _, said in turns):
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        if isinstance(said := turns[first][1], str):
            turns[first] = ("user", MARK * pictures + said)
    return [{"role": role, "content": said} for role, said in turns]


def _asked(record: Mapping[str, object], columns: Columns, pictures: int) -> list[object]:
    """A question and its answer as turns, the images first where no mark says where."""
    assert columns.question is not None
    question = _text(record[columns.question], f"`{columns.question}`")
    marks = "" if MARK in question else MARK * pictures
    answer = _text(record.get(columns.text or ""), f"`{columns.text}`")
    return [
        {"role": "user", "content": marks + question},
        {"role": "assistant", "content": answer},
    ]


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
    """An image given as bytes, as `{"bytes", "path"}`, as a data URL or base64, or as a path."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, bytes):
            return inspect(value)
        if isinstance(value, str) and value.startswith("data:"):
            return inspect(base64.b64decode(value.partition(",")[2], validate=True))
        if isinstance(value, str) and (packed := _base64(value)):
            return inspect(packed)
        if isinstance(value, str) and value:
            return inspect(fetch(value))
    except (ImageRefused, OSError) as error:
        named = f" ({redact(value[:2000])[:200]})" if isinstance(value, str) else ""
        raise RowRefused(f"{error}{named}") from error
    except binascii.Error as error:
        raise RowRefused(f"the data URL of an image is not base64: {error}") from error
    raise RowRefused(f"an image must be a path or bytes, found {type(value).__name__}")


def _base64(value: str) -> bytes | None:
    """A picture written as bare base64; None where the text is anything else."""
    if not _BASE64.fullmatch(value):
        return None
    try:
        data = base64.b64decode(value)
    except binascii.Error:
        return None
    return data if data.startswith(_PICTURES) else None
