"""Builds a row from a record: a conversation and its images.

Accepted shapes: an OCR pair, where the spec's instruction is the question and `text` the answer; a
`question` with its answer; Alpaca's `instruction`, `input` and `output`; and conversations of
`role` and `content`, or ShareGPT's `from` and `value`, whose content is text or a list of parts.
`job.prep.turns` parses each. Images are given in parts or in a column; each part without an image
of its own, and each `<image>` in a question, takes the next one of the column.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from job.prep.columns import Columns, ReadOptions
from job.prep.image_values import FetchImage, image_path, is_embedded, load_image
from job.prep.rows import EncodedImage, Message, Part, Row, RowRefused
from job.prep.turn_parts import ImageSlot, content_of, parts_of
from job.prep.turns import GIVEN_SYSTEM, Turn, turns_of
from job.prep.values import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    as_list,
    is_absent,
    is_image_path,
    looks_like_image,
    without_nulls,
)

_UNSUPPORTED = {
    "tools": "the model would not see them",
    "functions": "the model would not see them",
    "video": "only images are",
    "videos": "only images are",
    "audio": "only images are",
    "audios": "only images are",
    "reasoning_content": "it belongs to the assistant's turn in `messages`",
}
"""Columns that must not be ignored, with the reason why they are not supported."""
_ARCHIVE_SUFFIXES = (*IMAGE_SUFFIXES, *TEXT_SUFFIXES)
_EMPTY_AS_TEXT = ("[]", "{}", "null")  # empty lists and structs, serialized


def to_row(
    record: Mapping[str, object], options: ReadOptions, *, row_id: str, fetch: FetchImage
) -> Row:
    """Builds the row of a record.

    Raises RowRefused or AmbiguousColumns if it is not a valid row.
    """
    record = _clean(record)
    columns = Columns.of(options.columns, record, text_only=options.text_only)
    for name, reason in _UNSUPPORTED.items():
        value = record.get(name)
        if name not in columns.names and not is_absent(value) and value not in _EMPTY_AS_TEXT:
            raise RowRefused(f"`{name}` is not supported: {reason}")
    for name in ignored_image_columns(record, columns, options):
        fix = image_column_fix(name, columns)
        raise RowRefused(f"`{name}` contains an image but is not read: {fix}")
    turns = turns_of(record, columns, options)
    row = _RowBuilder(
        text_only=options.text_only, fetch=fetch, column=_image_column(record, columns)
    )
    row.add(turns)
    ignored = sorted({key for turn in turns for key in turn.ignored})
    return Row(
        id=row_id,
        messages=tuple(row.messages),
        images=tuple(row.images),
        ignored=(*_ignored_columns(record, columns), *ignored),
        given_system=turns[0].location == GIVEN_SYSTEM,
    )


def _ignored_columns(record: Mapping[str, object], columns: Columns) -> Iterator[str]:
    """The columns that have a value and are ignored."""
    read = [record[name] for name in columns.names if name in record]
    for name, value in record.items():
        # Archives name one member twice: by its suffix, and as `image` or `text`.
        member = f".{name}" in _ARCHIVE_SUFFIXES and any(value is each for each in read)
        if name not in columns.names and not is_absent(value) and not member:
            yield name


def _clean(record: Mapping[str, object]) -> Mapping[str, object]:
    """The record without the null keys that Arrow adds to give structs the same fields."""
    return {
        name: without_nulls(value) if isinstance(value, Mapping | list) else value
        for name, value in record.items()
    }


@dataclass(kw_only=True)
class _RowBuilder:
    """Collects messages and images; images are numbered in the order in which turns use them."""

    text_only: bool
    fetch: FetchImage
    column: list[object]
    """The values of the image column."""
    messages: list[Message] = field(default_factory=list)
    images: list[EncodedImage] = field(default_factory=list)
    _used: int = 0
    """Images of the column that turns have used."""

    def add(self, turns: list[Turn]) -> None:
        if self.column and not any(isinstance(p, ImageSlot) for turn in turns for p in turn.parts):
            # No turn has an image slot: put the images before the first question.
            first = next((turn for turn in turns if turn.role == "user"), None)
            if first is None:
                raise RowRefused("has images but no question to show them with")
            first.parts[:0] = [ImageSlot()] * len(self.column)
        for turn in turns:
            parts = tuple(
                Part(image=self._add_image(part, turn.location))
                if isinstance(part, ImageSlot)
                else Part(text=part)
                for part in turn.parts
            )
            self.messages.append(
                Message(role=turn.role, parts=parts, train=turn.train, reasoning=turn.reasoning)
            )
        if self._used < len(self.column):
            raise RowRefused(
                f"has {len(self.column)} images, but its messages use only {self._used}"
            )

    def _add_image(self, slot: ImageSlot, location: str) -> int:
        """Loads the slot's image; returns its index in the row."""
        if self.text_only:
            raise RowRefused(f"{location} has an image, but data.text_only is true")
        value = slot.value
        if is_absent(value):
            if self._used >= len(self.column):
                has = len(self.column)
                raise RowRefused(f"{location} uses more images than the row has, which is {has}")
            value = self.column[self._used]
            self._used += 1
            if is_absent(value):
                raise RowRefused(f"image {self._used} of the row is empty")
        self.images.append(load_image(value, self.fetch))
        return len(self.images) - 1


def _image_column(record: Mapping[str, object], columns: Columns) -> list[object]:
    """The values of the record's image column."""
    return as_list(record.get(columns.image)) if columns.image is not None else []


def image_values_of(record: Mapping[str, object], columns: Columns) -> Iterator[object]:
    """A record's image values, from its column and its turns: paths, bytes or structs."""
    yield from _image_column(record, columns)
    turns = record.get(columns.messages) if columns.messages is not None else None
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, Mapping):
            try:
                parts = parts_of(without_nulls(content_of(turn)), "", placeholders=False)
            except RowRefused:
                continue  # reported when the row is built
            yield from (part.value for part in parts if isinstance(part, ImageSlot))


def ignored_image_columns(
    record: Mapping[str, object], columns: Columns, options: ReadOptions
) -> Iterator[str]:
    """Columns of the record that seem to contain images but are ignored.

    None if the spec names the image column or sets `text_only`: then it is intended. A path beside
    embedded images, or with the file name of an image that is read, only describes these.
    """
    if options.text_only or options.columns.image is not None:
        return
    read: list[object] | None = None
    for name, value in record.items():
        if name in columns.names or not looks_like_image(value):
            continue
        if read is None:
            read = [each for each in image_values_of(record, columns) if not is_absent(each)]
        if any(each is value or each == value for each in read):
            continue  # archives name the same member in two ways
        if is_image_path(value):
            paths = [image_path(each) for each in read]
            if any(map(is_embedded, paths)) or _file_name(value) in map(_file_name, paths):
                continue
        yield name


def image_column_fix(name: str, columns: Columns) -> str:
    """How to change the spec so that the column is read, or explicitly ignored."""
    if columns.image is not None:
        return (
            f"write columns: {{image: {columns.image}}} to read only that one; several images of a "
            "row belong in one list"
        )
    return f"write columns: {{image: {name}}}"


def _file_name(path: object) -> str:
    return str(path).replace("\\", "/").rpartition("/")[2]
