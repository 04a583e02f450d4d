"""A contact sheet: a few prepared rows as one image, to see at a glance what will be trained."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from job.prep.images import decode
from job.prep.rows import Message, Row

if TYPE_CHECKING:
    from PIL.Image import Image

SHEET = "contact_sheet.png"
ROWS = 10
_WIDTH, _PICTURES, _MARGIN = 460, 150, 12  # pixels of a cell; images of a row share their height
_LETTERS, _LINE, _LINES_A_TURN, _LINES = 68, 15, 3, 16
_MOST_IMAGES = 6
_SOFT, _EDGE = "#5f6b7a", "#d5d8dc"


def contact_sheet(rows: Sequence[Row], path: Path) -> None:
    """Draws the rows, two beside each other: their images, and the whole conversation."""
    import PIL.Image

    cells = [_cell(row) for row in rows]
    pairs = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    heights = [max(cell.height for cell in pair) + _MARGIN for pair in pairs]
    sheet = PIL.Image.new("RGB", (2 * _WIDTH, max(1, sum(heights))), _EDGE)
    top = 0
    for pair, height in zip(pairs, heights, strict=True):
        for place, cell in enumerate(pair):
            sheet.paste(cell, (place * _WIDTH + _MARGIN // 2, top + _MARGIN // 2))
        top += height
    sheet.save(path)


def _cell(row: Row) -> "Image":
    import PIL.Image
    from PIL import ImageDraw, ImageFont

    lines = [(row.id[:_LETTERS], _SOFT), *_conversation(row.messages)]
    if len(lines) > _LINES:  # the last answer stays
        left = len(lines) - _LINES + 1
        lines = [*lines[: _LINES // 2], (f"… {left} lines …", _SOFT), *lines[_LINES // 2 + left :]]
    above = _PICTURES if row.images else _MARGIN // 2
    size = (_WIDTH - _MARGIN, above + _LINE * len(lines) + _MARGIN // 2)
    cell = PIL.Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    shown = row.images[:_MOST_IMAGES]
    for number, image in enumerate(shown):
        room = size[0] // len(shown)
        picture = decode(image)
        picture.thumbnail((room - _MARGIN, _PICTURES - _MARGIN))
        at = (number * room + (room - picture.width) // 2, (_PICTURES - picture.height) // 2)
        cell.paste(picture, at)
        draw.rectangle((at[0] - 1, at[1] - 1, at[0] + picture.width, at[1] + picture.height),
                       outline=_EDGE)  # fmt: skip
    if more := len(row.images) - len(shown):
        draw.text((_MARGIN // 2, 2), f"and {more} more images", fill=_SOFT, font=font)
    for number, (line, color) in enumerate(lines):
        draw.text((_MARGIN // 2, above + _LINE * number), line, fill=color, font=font)
    return cell


def _conversation(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """The lines of every turn with their colour: answers are black."""
    for message in messages:
        said = "".join(
            f"[image {part.image + 1}] " if part.image is not None else part.text or ""
            for part in message.parts
        )
        lines = textwrap.wrap(f"{message.role}: {said}", _LETTERS) or [f"{message.role}:"]
        if len(lines) > _LINES_A_TURN:
            lines = [*lines[:_LINES_A_TURN][:-1], lines[_LINES_A_TURN - 1][: _LETTERS - 2] + " …"]
        color = "black" if message.role == "assistant" else _SOFT
        yield from ((line, color) for line in lines)
