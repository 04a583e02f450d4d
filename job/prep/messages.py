"""From a source's record to a row: a conversation, and the images that it mentions.

Accepted are the shapes people have: an OCR pair, where the instruction of the spec is the question
and `text` the answer; a `question` with its answer; Alpaca's `instruction`, `input` and `output`; a
conversation of `role` and `content` or ShareGPT's `from` and `value`, whose content is text or a
list of parts. `job.prep.turns` makes turns of each. Images are given in parts, or in a column, from
which each part without an image of its own and each `<image>` in a question takes the next.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from job.prep.columns import Columns, Reading
from job.prep.images import ImageRefused, inspect
from job.prep.rows import EncodedImage, Message, Part, Row
from job.prep.turns import Picture, RowRefused, Turn, content_of, parts_of, turns_of
from job.prep.values import (
    IMAGE_BEGINNINGS,
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    is_absent,
    is_image_path,
    listed,
    looks_like_image,
    without_nulls,
)
from job.redaction import redact

__all__ = ["RowRefused", "named_images", "path_of", "to_row", "unread_images"]

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_REFUSED = {
    "tools": "the model would not see them",
    "functions": "the model would not see them",
    "video": "only images are",
    "videos": "only images are",
    "audio": "only images are",
    "audios": "only images are",
}
"""Columns that change what a row says, and that nothing here reads."""
_MEMBERS = (*IMAGE_SUFFIXES, *TEXT_SUFFIXES)
_NOTHING = ("[]", "{}", "null")  # what lists and structs are where they were written as text

Fetch = Callable[[str], bytes]
"""The bytes of an image by the path or URI that a record names; raises JobError or OSError."""


def to_row(record: Mapping[str, object], reading: Reading, *, row_id: str, fetch: Fetch) -> Row:
    """The row that a record describes.

    Raises RowRefused, or Unclear, if it describes none.
    """
    record = _clean(record)
    columns = Columns.of(reading.columns, record, text_only=reading.text_only)
    for name, why in _REFUSED.items():
        value = record.get(name)
        if name not in columns.read and not is_absent(value) and value not in _NOTHING:
            raise RowRefused(f"`{name}` is not read: {why}")
    for name in unread_images(record, columns, reading):
        raise RowRefused(f"`{name}` holds an image and is not read: {image_line(name, columns)}")
    turns = turns_of(record, columns, reading)
    row = _Row(text_only=reading.text_only, fetch=fetch, column=listed_images(record, columns))
    row.say(turns)
    return Row(
        id=row_id,
        messages=tuple(row.messages),
        images=tuple(row.images),
        unread=(*_unread(record, columns), *sorted({n for turn in turns for n in turn.unread})),
    )


def _unread(record: Mapping[str, object], columns: Columns) -> Iterator[str]:
    """The columns with a value that are not read."""
    read = [record[name] for name in columns.read if name in record]
    for name, value in record.items():
        # Archives name one member twice: by its ending, and as `image` or `text`.
        member = f".{name}" in _MEMBERS and any(value is each for each in read)
        if name not in columns.read and not is_absent(value) and not member:
            yield name


def _clean(record: Mapping[str, object]) -> Mapping[str, object]:
    """The record without null keys inside its columns, which Arrow adds to make structs alike."""
    return {
        name: without_nulls(value) if isinstance(value, Mapping | list) else value
        for name, value in record.items()
    }


@dataclass(kw_only=True)
class _Row:
    """A row in the making: images are numbered in the order in which turns mention them."""

    text_only: bool
    fetch: Fetch
    column: list[object]
    """What the column of images holds, unread."""
    messages: list[Message] = field(default_factory=list)
    images: list[EncodedImage] = field(default_factory=list)
    _taken: int = 0

    def say(self, turns: list[Turn]) -> None:
        if self.column and not any(isinstance(p, Picture) for turn in turns for p in turn.parts):
            # No turn says where the images stand: they come before the first question.
            first = next((turn for turn in turns if turn.role == "user"), None)
            if first is None:
                raise RowRefused("the row has images and no question to show them with")
            first.parts[:0] = [Picture()] * len(self.column)
        for turn in turns:
            parts = tuple(
                Part(image=self._picture(part, turn.where))
                if isinstance(part, Picture)
                else Part(text=part)
                for part in turn.parts
            )
            self.messages.append(Message(role=turn.role, parts=parts, train=turn.train))
        if self._taken < len(self.column):
            raise RowRefused(
                f"the row has {len(self.column)} images and its messages mention fewer"
            )

    def _picture(self, part: Picture, where: str) -> int:
        """The number of the image that a part shows."""
        if self.text_only:
            raise RowRefused(f"{where} has an image, and data.text_only says that rows have none")
        value = part.value
        if is_absent(value):
            if self._taken >= len(self.column):
                raise RowRefused(
                    f"{where} mentions more images than the row has, which is {len(self.column)}"
                )
            value = self.column[self._taken]
            self._taken += 1
            if is_absent(value):
                raise RowRefused(f"image {self._taken} of the row is empty")
        self.images.append(_image(value, self.fetch))
        return len(self.images) - 1


def listed_images(record: Mapping[str, object], columns: Columns) -> list[object]:
    """What the record's column of images holds."""
    return listed(record.get(columns.image)) if columns.image is not None else []


def named_images(record: Mapping[str, object], columns: Columns) -> Iterator[object]:
    """What a record gives as images, in its column and its turns: paths, bytes or structs."""
    yield from listed_images(record, columns)
    turns = record.get(columns.messages) if columns.messages is not None else None
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, Mapping):
            try:
                parts = parts_of(without_nulls(content_of(turn)), "", marks=False)
            except RowRefused:
                continue  # whoever reads the row says so
            yield from (part.value for part in parts if isinstance(part, Picture))


def unread_images(
    record: Mapping[str, object], columns: Columns, reading: Reading
) -> Iterator[str]:
    """Columns of the record that seem to hold images, and that are not read.

    None if the spec names the column of images, or says that there are none: then it is meant. A
    path beside images that the record holds, or of the same name as one that it names, tells about
    these.
    """
    if reading.text_only or reading.columns.image is not None:
        return
    found: list[object] | None = None
    for name, value in record.items():
        if name in columns.read or not looks_like_image(value):
            continue
        if found is None:
            found = [each for each in named_images(record, columns) if not is_absent(each)]
        if any(each is value or each == value for each in found):
            continue  # archives name the same member in two ways
        if is_image_path(value):
            paths = [path_of(each) for each in found]
            if any(map(_is_held, paths)) or _file(value) in map(_file, paths):
                continue
        yield name


def image_line(name: str, columns: Columns) -> str:
    """The line of a spec that reads the column, or that says that it is not meant."""
    if columns.image is not None:
        return (
            f"write columns: {{image: {columns.image}}} if that one alone is meant; several images "
            f"of a row are one list"
        )
    return f"write columns: {{image: {name}}}"


def path_of(value: object) -> object:
    """The path of an image that a record names; None if it holds the image."""
    if isinstance(value, Mapping):
        value = None if value.get("bytes") else value.get("path") or value.get("url")
    return None if isinstance(value, str) and value.startswith("data:") else value


def _is_held(path: object) -> bool:
    return not isinstance(path, str) or _base64(path) is not None


def _file(path: object) -> str:
    return str(path).replace("\\", "/").rpartition("/")[2]


def _image(value: object, fetch: Fetch) -> EncodedImage:
    """An image given as bytes, as `{"bytes", "path"}`, as a data URL or base64, or as a path."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    try:
        if isinstance(value, bytes):
            return inspect(value)
        if isinstance(value, str) and value.startswith("data:"):
            return inspect(_data_url(value))
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


def _data_url(value: str) -> bytes:
    """The bytes of a data URL, whose base64 may be wrapped into lines."""
    head, _, data = value.partition(",")
    if not head.endswith(";base64"):
        raise RowRefused("the data URL of an image is not base64: it does not say ;base64")
    return base64.b64decode("".join(data.split()), validate=True)


def _base64(value: str) -> bytes | None:
    """An image written as bare base64; None if the text is anything else."""
    if not _BASE64.fullmatch(value):
        return None
    try:
        data = base64.b64decode(value)
    except binascii.Error:
        return None
    return data if data.startswith(IMAGE_BEGINNINGS) else None
