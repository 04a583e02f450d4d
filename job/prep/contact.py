"""A contact sheet: a few prepared rows as one picture, to see at a glance what will be trained."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from job.prep.images import decode
from job.prep.records import Row

if TYPE_CHECKING:
    from PIL.Image import Image

SHEET = "contact_sheet.png"
ROWS = 10
_WIDTH, _PICTURE, _TEXT, _MARGIN = 460, 150, 62, 12  # pixels of a cell
_LETTERS, _LINES = 68, 3


def contact_sheet(rows: Sequence[Row], path: Path) -> None:
    """Draws the rows, two beside each other: the first picture and the answer."""
    import PIL.Image

    height = _PICTURE + _TEXT
    sheet = PIL.Image.new("RGB", (2 * _WIDTH, max(1, -(-len(rows) // 2)) * height), "#d5d8dc")
    for place, row in enumerate(rows):
        cell = _cell(row, (_WIDTH - _MARGIN, height - _MARGIN))
        left, top = (place % 2) * _WIDTH, (place // 2) * height
        sheet.paste(cell, (left + _MARGIN // 2, top + _MARGIN // 2))
    sheet.save(path)


def _cell(row: Row, size: tuple[int, int]) -> "Image":
    import PIL.Image
    from PIL import ImageDraw, ImageFont

    cell = PIL.Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    room = (size[0] - _MARGIN, _PICTURE - _MARGIN)
    if row.images:
        picture = decode(row.images[0])
        picture.thumbnail(room)
        at = ((size[0] - picture.width) // 2, (_PICTURE - picture.height) // 2)
        cell.paste(picture, at)
        draw.rectangle((at[0] - 1, at[1] - 1, at[0] + picture.width, at[1] + picture.height),
                       outline="#d5d8dc")  # fmt: skip
    lines = textwrap.wrap(row.answer, _LETTERS)
    text = [row.id[:_LETTERS], *lines[: _LINES - 1]]
    if len(lines) > _LINES - 1:
        text[-1] = text[-1][: _LETTERS - 2] + " …"
    for number, line in enumerate(text):
        color = "#5f6b7a" if number == 0 else "black"
        draw.text((_MARGIN // 2, _PICTURE + 15 * number), line, fill=color, font=font)
    return cell
