"""Parses the content of a turn into texts and images, in order."""

from collections.abc import Mapping
from dataclasses import dataclass

from job.prep.rows import RowRefused
from job.prep.values import is_absent

MAX_TEXT = 100_000
IMAGE_PLACEHOLDER = "<image>"
"""An image in the text of a question."""
_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes", "base64")
PART_KEYS = ("type", "text", *_IMAGE_KEYS)


@dataclass(frozen=True, kw_only=True)
class ImageSlot:
    """An image in a turn: its own `value`, or the next one of the row's image column."""

    value: object = None


def content_of(message: Mapping[object, object]) -> object:
    """A turn's content, as `content` or as ShareGPT's `value`."""
    return message.get("content", message.get("value"))


def parts_of(content: object, location: str, *, placeholders: bool) -> list[str | ImageSlot]:
    """Content as texts and images in order; with `placeholders`, `<image>` in text is an image.

    Raises RowRefused for any other part.
    """
    parts: list[str | ImageSlot] = []
    for item in content if isinstance(content, list) else [content]:
        part = _part(item, location)
        if isinstance(part, str) and placeholders and IMAGE_PLACEHOLDER in part:
            parts += _split_at_placeholders(part)
        else:
            parts.append(part)
    return parts


def _part(part: object, location: str) -> str | ImageSlot:
    if not isinstance(part, Mapping):
        return text_of(part, location)
    images = {key: part[key] for key in _IMAGE_KEYS if not is_absent(part.get(key))}
    text = part.get("text")
    kind = part.get("type") or ("image" if images or text is None else "text")
    if kind in ("image", "image_url"):
        if "bytes" in images:
            images.pop("path", None)  # the original file name of these bytes
        if len(images) > 1 or not is_absent(text):
            several = [*images, *([] if is_absent(text) else ["text"])]
            raise RowRefused(f"{location} has {' and '.join(several)} in one part")
        value = next(iter(images.values()), None)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        return ImageSlot(value=value)
    if kind != "text":
        raise RowRefused(f"{location} has a part of type {kind}, which is not supported")
    if images:
        raise RowRefused(f"{location} has text and {' and '.join(images)} in one part")
    return text_of(text, location)


def _split_at_placeholders(text: str) -> list[str | ImageSlot]:
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    parts: list[str | ImageSlot] = [first] if first.strip() else []
    for each in rest:
        parts.append(ImageSlot())
        if each.strip():
            parts.append(each.lstrip("\n"))
    return parts


def text_of(value: object, location: str) -> str:
    """The value as text. Raises RowRefused if it is of another type or too long."""
    if not isinstance(value, str):
        raise RowRefused(f"{location} must be text, found {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise RowRefused(f"{location} has {len(value)} characters, more than {MAX_TEXT}")
    return value
