"""What a value of a record is: nothing, an image, or something else."""

from collections.abc import Mapping

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TEXT_SUFFIXES = (".txt", ".tex", ".latex")
IMAGE_BEGINNINGS = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_IN_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
_LONGEST_PATH = 1024


def is_absent(value: object) -> bool:
    """Whether it says nothing: null, empty, or a struct or list of nothing else, as Arrow writes
    where one row has a field and another has not."""
    match value:
        case None | "" | b"":
            return True
        case Mapping():
            return all(map(is_absent, value.values()))
        case list() | tuple():
            return all(map(is_absent, value))
    return False


def without_nulls(value: object) -> object:
    """The value without the keys of structs that are null, at any depth."""
    match value:
        case Mapping():
            return {key: without_nulls(each) for key, each in value.items() if each is not None}
        case list():
            return [without_nulls(each) for each in value]
    return value


def listed(value: object) -> list[object]:
    """The items of a list; one value alone is a list of one, and an absent one an empty list."""
    if is_absent(value):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def looks_like_image(value: object) -> bool:
    """Whether a value is an image or names one: bytes, `{"bytes", "path"}`, a data URL, base64, a
    path that ends as images do, or a list with one of these."""
    match value:
        case bytes():
            is_sound = value.startswith(b"RIFF") and value[8:12] != b"WEBP"
            return value.startswith(IMAGE_BEGINNINGS) and not is_sound
        case Mapping():
            kept = (value.get(key) for key in ("bytes", "path", "url", "image"))
            return any(map(looks_like_image, kept))
        case list() | tuple():
            return any(map(looks_like_image, value))
        case str():
            return value.startswith(("data:image/", *_IN_BASE64)) or is_image_path(value)
    return False


def is_image_path(value: object) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= _LONGEST_PATH
        and "\n" not in value
        and value.lower().partition("?")[0].endswith(IMAGE_SUFFIXES)
    )
