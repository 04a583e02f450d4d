"""Loads an image from a value: bytes, a struct, a data URL, base64, or a path."""

import base64
import binascii
import re
from collections.abc import Callable, Mapping

from job.prep.images import ImageRefused, inspect
from job.prep.rows import EncodedImage, RowRefused
from job.prep.values import IMAGE_MAGIC
from job.redaction import redact

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")

FetchImage = Callable[[str], bytes]
"""The bytes of an image by the path or URI in a record; raises JobError or OSError."""


def load_image(value: object, fetch: FetchImage) -> EncodedImage:
    """The image that a value contains or names. Raises RowRefused if it cannot be used."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    try:
        if isinstance(value, bytes):
            return inspect(value)
        if isinstance(value, str) and value.startswith("data:"):
            return inspect(_from_data_url(value))
        if isinstance(value, str) and (data := _from_base64(value)):
            return inspect(data)
        if isinstance(value, str) and value:
            return inspect(fetch(value))
    except (ImageRefused, OSError) as error:
        named = f" ({redact(value[:2000])[:200]})" if isinstance(value, str) else ""
        raise RowRefused(f"{error}{named}") from error
    except binascii.Error as error:
        raise RowRefused(f"the data URL of an image is not base64: {error}") from error
    raise RowRefused(f"an image must be a path or bytes, found {type(value).__name__}")


def image_path(value: object) -> object:
    """The path of an image that a record names; None if the value contains the image."""
    if isinstance(value, Mapping):
        value = None if value.get("bytes") else value.get("path") or value.get("url")
    return None if isinstance(value, str) and value.startswith("data:") else value


def is_embedded(path: object) -> bool:
    """Whether a result of `image_path` is not a path, because the record contains the image."""
    return not isinstance(path, str) or _from_base64(path) is not None


def _from_data_url(value: str) -> bytes:
    """The bytes of a data URL, whose base64 may be wrapped into lines."""
    head, _, data = value.partition(",")
    if not head.endswith(";base64"):
        raise RowRefused("the data URL of an image is not base64: ;base64 is missing")
    return base64.b64decode("".join(data.split()), validate=True)


def _from_base64(value: str) -> bytes | None:
    """The bytes of an image in bare base64; None for any other text."""
    if not _BASE64.fullmatch(value):
        return None
    try:
        data = base64.b64decode(value)
    except binascii.Error:
        return None
    return data if data.startswith(IMAGE_MAGIC) else None
