"""Checks on images as they come from data: read the bytes, never trust the name.

The size is read from the header and checked before anything is decoded: a picture of a few
kilobytes can unfold to gigabytes.
"""

import io
import warnings
from typing import TYPE_CHECKING

from job.prep.colors import ImageRefused, to_rgb
from job.prep.dedup import look
from job.prep.rows import EncodedImage

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64 * 2**20
MAX_SIDE = 16_384
MIN_SIDE = 2
ORIENTATION = 0x0112  # the EXIF tag
MAX_ASPECT_RATIO = 200  # the image processors of the Qwen and ERNIE families refuse more


def inspect(data: bytes) -> EncodedImage:
    """The bytes with the size that a decoder will give them.

    Raises ImageRefused if the bytes are no whole image of a known format within the limits, or
    cannot be shown in RGB as they are.
    """
    import PIL.Image
    from PIL import UnidentifiedImageError

    if not data:
        raise ImageRefused("image is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise ImageRefused(f"image has {len(data)} bytes, more than {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(*image.size)
                # Decoded once here, as for training: an image that is truncated, or cannot be
                # shown as it is, must not stop the training that comes hours later.
                shown = _upright(image, data)
                seen = look(shown)
    except PIL.Image.DecompressionBombError as error:
        raise ImageRefused(f"image is too large: {error}") from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ImageRefused(f"image is not one of {known}: {_looks_like(data)}") from error
    except ImageRefused:
        raise
    except Exception as error:
        raise ImageRefused(f"image is damaged: {error}") from error
    return EncodedImage(data=data, width=shown.width, height=shown.height, look=seen)


def _check_size(width: int, height: int) -> None:
    shape = f"image is {width}×{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise ImageRefused(f"{shape}; the shorter side needs at least {MIN_SIDE}")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageRefused(
            f"{shape}; at most {MAX_SIDE} a side and {MAX_PIXELS / 2**20:.0f} million in all"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageRefused(f"{shape}; its sides differ by more than {MAX_ASPECT_RATIO} times")


def _looks_like(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "the bytes are an HTML page"
    if start.startswith((b"<?xml", b"<svg")):
        return "the bytes are XML or SVG"
    return f"the bytes begin with {data[:8]!r}"


def decode(image: EncodedImage) -> "Image":
    """The pixels as an RGB `PIL.Image`, upright by EXIF and with transparency on white.

    Raises ImageRefused if the pixels turn out to be damaged.
    """
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(image.data), formats=FORMATS) as opened:
            return _upright(opened, image.data)
    except ImageRefused:
        raise
    except Exception as error:
        raise ImageRefused(f"image is damaged: {error}") from error


def _upright(opened: "Image", data: bytes) -> "Image":
    """The first frame in RGB; `data` is the file."""
    from PIL import ImageOps

    opened.load()
    shown = to_rgb(opened, data)
    # Looked up after loading: a PNG may tell it after its pixels, and a TIFF is upright by then.
    turned = opened.getexif().get(ORIENTATION, 1)
    if turned not in range(2, 9):
        return shown
    shown.getexif()[ORIENTATION] = turned  # what is put on white has lost it
    return ImageOps.exif_transpose(shown)
