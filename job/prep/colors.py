"""Converts any image that Pillow opens to 8-bit RGB on white, or refuses it.

Pillow's own conversion clips deeper greys at 255, which turns them white or black.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

DEEP_GREY_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's grey modes of more than 8 bits."""
MIN_CONTRAST = 16
"""Difference between levels, of 255, that counts as visible."""
_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2  # PNG color types
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # values of the latter two


class ImageRefused(ValueError):
    """The image cannot be used; the message is the reason for the reject."""


def to_rgb(image: "Image", data: bytes = b"") -> "Image":
    """The image in mode RGB, (H, W, 3) of 8 bits, with transparency on white.

    `data` is the file that it was opened from. Deep greys are scaled by the range of their type,
    floats from [0, 1]. Raises ImageRefused if the result would look different, or be blank.
    """
    _scale_transparent_color(image, data)
    if image.mode in DEEP_GREY_MODES:
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _scale_transparent_color(image: "Image", data: bytes) -> None:
    """Scales a PNG's transparent color, as Pillow does with the pixels only."""
    if "transparency" not in image.info or not data.startswith(_PNG):
        return
    bits, color_type = data[24:26]  # of IHDR, always the first chunk
    if color_type == _GREY and bits in (2, 4):
        image.info["transparency"] *= 255 // (2**bits - 1)
    if color_type == _RGB and bits == 16:
        raise ImageRefused(
            "image has 16-bit colors and one transparent color (tRNS), which is ambiguous in "
            "8 bits; save it with an alpha channel"
        )


def _to_eight_bits(image: "Image") -> "Image":
    """A deep grey image in mode L, or LA if one of its levels is transparent."""
    import numpy as np
    import PIL.Image

    values = np.asarray(image)  # (H, W)
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    levels = _float_levels(values) if image.mode == "F" else _integer_levels(values, tags)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 255 - levels
    grey = PIL.Image.fromarray(levels)
    if "transparency" in image.info:
        opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        grey.putalpha(PIL.Image.fromarray(opaque))
    return grey


def _float_levels(values: "np.ndarray") -> "np.ndarray":
    """(H, W) floats in [0, 1] as (H, W) bytes."""
    import numpy as np

    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 1:  # false for NaN
        raise ImageRefused(
            f"image has floats from {low:g} to {high:g}; they must be from 0 (black) to 1 "
            "(white): scale them, or save 8 bits"
        )
    _require_visible(high, 1.0)
    return np.rint(values * 255).astype(np.uint8)


def _integer_levels(values: "np.ndarray", tags: Mapping[int, Any]) -> "np.ndarray":
    """The upper 8 bits of (H, W) integers, as Pillow takes them from 16-bit colors."""
    import numpy as np

    bits = tags.get(_BITS, (8 * values.itemsize,))[0]
    if values.dtype.kind == "i" and tags.get(_SAMPLE_FORMAT, (0,))[0] == _UNSIGNED:
        values = values.view(np.uint32)
    elif values.dtype.kind == "i":
        bits -= 1  # the sign
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise ImageRefused(
            f"image has grey levels from {low} to {high}; they must not be negative: save "
            "unsigned 8 or 16 bits"
        )
    _require_visible(high, 2**bits - 1)
    return (values >> (bits - 8)).astype(np.uint8)


def _require_visible(high: float, full: float) -> None:
    """Refuses an image that would be nearly black: its levels have a smaller range than its type.

    An image of only zeros is accepted as intentionally black.
    """
    if 0 < high < full * MIN_CONTRAST / 256:
        raise ImageRefused(
            f"image has grey levels up to {high:.10g} where white is {full:.10g}, so it would be "
            "black: scale them to the full range, or save 8 bits"
        )


def _on_white(image: "Image") -> "Image":
    import PIL.Image

    if image.mode == "La":
        image = image.convert("LA")  # Pillow cannot convert La to RGBA
    layer = image.convert("RGBA")
    white, black = (
        PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, color), layer).convert("RGB")
        for color in ("white", "black")
    )
    if _contrast(white) < MIN_CONTRAST:
        if _contrast(black) >= MIN_CONTRAST:
            raise ImageRefused(
                "image is white on a transparent background, so it would be blank: give it an "
                "opaque background"
            )
        if layer.getchannel("A").getextrema() == (0, 0) and _contrast(layer) >= MIN_CONTRAST:
            raise ImageRefused("image is fully transparent: save it without its alpha channel")
    return white


def _contrast(image: "Image") -> int:
    """The largest difference between two levels of the red, green or blue channel."""
    return max(high - low for low, high in map(_extrema, image.split()[:3]))


def _extrema(channel: "Image") -> tuple[int, int]:
    low, high = channel.getextrema()
    assert isinstance(low, int)
    assert isinstance(high, int)
    return low, high
