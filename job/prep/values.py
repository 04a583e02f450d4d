"""Classifies the values of a record: absent, an image, or something else."""

from collections.abc import Mapping

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TEXT_SUFFIXES = (".txt", ".tex", ".latex")
IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_BASE64_MAGIC = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
_MAX_PATH_LENGTH = 1024


def is_absent(value: object) -> bool:
    """Whether a value is null, empty, or a struct or list of only such values.

    Arrow writes the latter for a field that only other rows have.
    """
    match value:
        case None | "" | b"":
            return True
        case Mapping():
            return all(map(is_absent, value.values()))
        case list() | tuple():
            return all(map(is_absent, value))
    return False


def without_nulls(value: object) -> object:
    """The value without null keys of structs, at any depth."""
    match value:
        case Mapping():
            return {key: without_nulls(each) for key, each in value.items() if each is not None}
        case list():
            return [without_nulls(each) for each in value]
    return value


def as_list(value: object) -> list[object]:
    """A list as is, a single value as a list of one, an absent value as an empty list."""
    if is_absent(value):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def looks_like_image(value: object) -> bool:
    """Whether a value contains or names an image: bytes, `{"bytes", "path"}`, a data URL, base64,
    a path with an image suffix, or a list with one of these."""
    match value:
        case bytes():
            is_wave = value.startswith(b"RIFF") and value[8:12] != b"WEBP"
            return value.startswith(IMAGE_MAGIC) and not is_wave
        case Mapping():
            candidates = (value.get(key) for key in ("bytes", "path", "url", "image"))
            return any(map(looks_like_image, candidates))
        case list() | tuple():
            return any(map(looks_like_image, value))
        case str():
            return value.startswith(("data:image/", *_BASE64_MAGIC)) or is_image_path(value)
    return False


def is_image_path(value: object) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= _MAX_PATH_LENGTH
        and "\n" not in value
        and value.lower().partition("?")[0].endswith(IMAGE_SUFFIXES)
    )
