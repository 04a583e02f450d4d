"""The contact sheet: a few prepared rows as one image, to check the data at a glance."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from job.prep.images import decode
from job.prep.rows import EncodedImage, Message, Row

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw as Draw

CONTACT_SHEET = "contact_sheet.png"
SHEET_ROWS = 10
_CELL_WIDTH, _IMAGE_HEIGHT, _MARGIN = 460, 150, 12  # pixels
_LINE_CHARACTERS, _LINE_HEIGHT, _MESSAGE_LINES, _MAX_LINES = 68, 15, 3, 16
_MAX_IMAGES = 6
_GREY, _BORDER = "#5f6b7a", "#d5d8dc"


def contact_sheet(rows: Sequence[Row], path: Path) -> None:
    """Draws the rows in two columns, each with its images and the whole conversation."""
    import PIL.Image

    cells = [_cell(row) for row in rows]
    pairs = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    heights = [max(cell.height for cell in pair) + _MARGIN for pair in pairs]
    sheet = PIL.Image.new("RGB", (2 * _CELL_WIDTH, max(1, sum(heights))), _BORDER)
    top = 0
    for pair, height in zip(pairs, heights, strict=True):
        for column, cell in enumerate(pair):
            sheet.paste(cell, (column * _CELL_WIDTH + _MARGIN // 2, top + _MARGIN // 2))
        top += height
    sheet.save(path)


def _cell(row: Row) -> "Image":
    import PIL.Image
    from PIL import ImageDraw, ImageFont

    lines = [(row.id[:_LINE_CHARACTERS], _GREY), *_conversation(row.messages)]
    if len(lines) > _MAX_LINES:  # the last answer is always shown
        cut = len(lines) - _MAX_LINES + 1
        half = _MAX_LINES // 2
        lines = [*lines[:half], (f"… {cut} lines …", _GREY), *lines[half + cut :]]
    above = _IMAGE_HEIGHT if row.images else _MARGIN // 2
    size = (_CELL_WIDTH - _MARGIN, above + _LINE_HEIGHT * len(lines) + _MARGIN // 2)
    cell = PIL.Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    _paste_images(cell, draw, row.images[:_MAX_IMAGES])
    if (more := len(row.images) - _MAX_IMAGES) > 0:
        draw.text((_MARGIN // 2, 2), f"and {more} more images", fill=_GREY, font=font)
    for number, (line, color) in enumerate(lines):
        draw.text((_MARGIN // 2, above + _LINE_HEIGHT * number), line, fill=color, font=font)
    return cell


def _paste_images(cell: "Image", draw: "Draw", images: Sequence[EncodedImage]) -> None:
    """Pastes the images side by side at the top of the cell, at most `_IMAGE_HEIGHT` high."""
    for number, encoded in enumerate(images):
        width = cell.width // len(images)
        image = decode(encoded)
        image.thumbnail((width - _MARGIN, _IMAGE_HEIGHT - _MARGIN))
        left, top = number * width + (width - image.width) // 2, (_IMAGE_HEIGHT - image.height) // 2
        cell.paste(image, (left, top))
        box = (left - 1, top - 1, left + image.width, top + image.height)
        draw.rectangle(box, outline=_BORDER)


def _conversation(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """The lines of all messages with their colors: black for answers, else grey."""
    for message in messages:
        text = "".join(
            f"[image {part.image + 1}] " if part.image is not None else part.text or ""
            for part in message.parts
        )
        lines = textwrap.wrap(f"{message.role}: {text}", _LINE_CHARACTERS) or [f"{message.role}:"]
        if len(lines) > _MESSAGE_LINES:
            last = lines[_MESSAGE_LINES - 1][: _LINE_CHARACTERS - 2] + " …"
            lines = [*lines[: _MESSAGE_LINES - 1], last]
        color = "black" if message.role == "assistant" else _GREY
        yield from ((line, color) for line in lines)
