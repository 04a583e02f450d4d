"""Validates and decodes images, whatever their file names.

The size is read from the header and checked before decoding, since a file of a few kilobytes can
decode to gigabytes.
"""

import io
import warnings
from typing import TYPE_CHECKING

from job.prep.colors import ImageRefused, to_rgb
from job.prep.dedup import difference_hash
from job.prep.rows import EncodedImage

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64 * 2**20
MAX_SIDE = 16_384
MIN_SIDE = 2
EXIF_ORIENTATION = 0x0112
MAX_ASPECT_RATIO = 200  # the limit of the Qwen and ERNIE image processors


def inspect(data: bytes) -> EncodedImage:
    """Validates an image file; returns it with its size after `decode`.

    Raises ImageRefused if the bytes are not a complete image of a known format within the limits,
    or if it cannot be converted to RGB.
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
                # Decode as in training: a damaged image must not stop training hours later.
                rgb = _upright_rgb(image, data)
                hashed = difference_hash(rgb)
    except PIL.Image.DecompressionBombError as error:
        raise ImageRefused(f"image is too large: {error}") from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ImageRefused(f"image is not one of {known}: {_describe(data)}") from error
    except ImageRefused:
        raise
    except Exception as error:
        raise ImageRefused(f"image is damaged: {error}") from error
    return EncodedImage(data=data, width=rgb.width, height=rgb.height, difference_hash=hashed)


def _check_size(width: int, height: int) -> None:
    size = f"image is {width}×{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise ImageRefused(f"{size}; the shorter side must be at least {MIN_SIDE}")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageRefused(
            f"{size}; at most {MAX_SIDE} a side and {MAX_PIXELS / 2**20:.0f} million in total"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageRefused(f"{size}; the aspect ratio must not exceed {MAX_ASPECT_RATIO}")


def _describe(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "the bytes are an HTML page"
    if start.startswith((b"<?xml", b"<svg")):
        return "the bytes are XML or SVG"
    return f"the bytes begin with {data[:8]!r}"


def decode(image: EncodedImage) -> "Image":
    """The image in RGB, upright by EXIF and with transparency on white.

    Raises ImageRefused if the pixels are damaged.
    """
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(image.data), formats=FORMATS) as opened:
            return _upright_rgb(opened, image.data)
    except ImageRefused:
        raise
    except Exception as error:
        raise ImageRefused(f"image is damaged: {error}") from error


def _upright_rgb(opened: "Image", data: bytes) -> "Image":
    """The first frame in RGB; `data` is the file."""
    from PIL import ImageOps

    opened.load()
    rgb = to_rgb(opened, data)
    # Read after loading: a PNG may store EXIF after its pixels, and a TIFF is upright by then.
    orientation = opened.getexif().get(EXIF_ORIENTATION, 1)
    if orientation not in range(2, 9):
        return rgb
    rgb.getexif()[EXIF_ORIENTATION] = orientation  # compositing on white drops it
    return ImageOps.exif_transpose(rgb)
