"""Any image that Pillow opens as 8-bit RGB on white: shown as it is, or refused.

Pillow's own conversion of deeper greys cuts their values at 255, so that they turn white or black.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Modes of grey levels with more than 8 bits."""
SEEN = 16
"""Of 255: the least difference between levels that counts as something to see."""
_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2  # colour types of PNG
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # values of the latter two


class ImageRefused(ValueError):
    """The image cannot be used; the text says why, for the list of rejects."""


def to_rgb(image: "Image", data: bytes = b"") -> "Image":
    """The image in mode RGB, (H, W, 3) of 8 bits, with transparency on white.

    `data` is the file that it was opened from. Deep greys are scaled by the range of their type,
    floats from 0 to 1. Raises ImageRefused if that would show something else, or nothing.
    """
    _read_color_key(image, data)
    if image.mode in DEEP:
        image = _eight_bits(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _read_color_key(image: "Image", data: bytes) -> None:
    """Scales a PNG's transparent colour as Pillow scales the pixels, but not the colour."""
    if "transparency" not in image.info or not data.startswith(_PNG):
        return
    bits, kind = data[24:26]  # of the header, which is always the first chunk
    if kind == _GREY and bits in (2, 4):
        image.info["transparency"] *= 255 // (2**bits - 1)
    if kind == _RGB and bits == 16:
        raise ImageRefused(
            "image has 16-bit colors and a transparent one among them (tRNS), which 8 bits cannot "
            "tell from its neighbors; save it with an alpha channel"
        )


def _eight_bits(image: "Image") -> "Image":
    """A deep grey image in mode L; in LA if one of its levels is transparent."""
    import numpy as np
    import PIL.Image

    values = np.asarray(image)  # (H, W)
    tags: Any = getattr(image, "tag_v2", {})
    levels = _float_levels(values) if image.mode == "F" else _integer_levels(values, tags)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 255 - levels
    shown = PIL.Image.fromarray(levels)
    if "transparency" in image.info:
        opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        shown.putalpha(PIL.Image.fromarray(opaque))
    return shown


def _float_levels(values: "np.ndarray") -> "np.ndarray":
    import numpy as np

    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 1:  # NaN is neither
        raise ImageRefused(
            f"image has floats from {low:g} to {high:g}; only those from 0 (black) to 1 (white) "
            "say how bright they are: scale them, or save 8 bits"
        )
    _require_seen(high, 1.0)
    return np.rint(values * 255).astype(np.uint8)


def _integer_levels(values: "np.ndarray", tags: Any) -> "np.ndarray":
    """The upper 8 bits, as Pillow takes them of colors with 16."""
    import numpy as np

    bits = tags.get(_BITS, (8 * values.itemsize,))[0]
    if values.dtype.kind == "i" and tags.get(_SAMPLE_FORMAT, (0,))[0] == _UNSIGNED:
        values = values.view(np.uint32)
    elif values.dtype.kind == "i":
        bits -= 1  # the sign
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise ImageRefused(
            f"image has grey levels from {low} to {high}; negative ones have no brightness: "
            "save 8 or 16 bits without a sign"
        )
    _require_seen(high, 2**bits - 1)
    return (values >> (bits - 8)).astype(np.uint8)


def _require_seen(high: float, full: float) -> None:
    """Refuses what would be all but black: its levels are surely those of a smaller range."""
    if 0 < high < full * SEEN / 256:
        raise ImageRefused(
            f"image has grey levels up to {high:.10g} where white is {full:.10g}, so it would be "
            "black: scale them to the whole range, or save 8 bits"
        )


def _on_white(image: "Image") -> "Image":
    import PIL.Image

    if image.mode == "La":
        image = image.convert("LA")  # Pillow knows no way to RGBA
    layer = image.convert("RGBA")
    white, black = (
        PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, ground), layer).convert("RGB")
        for ground in ("white", "black")
    )
    if _contrast(white) < SEEN:
        if _contrast(black) >= SEEN:
            raise ImageRefused(
                "image is white on a transparent ground, so nothing is seen on white: "
                "give it a ground"
            )
        if layer.getchannel("A").getextrema() == (0, 0) and _contrast(layer) >= SEEN:
            raise ImageRefused("image is transparent everywhere: save it without its alpha channel")
    return white


def _contrast(image: "Image") -> int:
    """The largest difference between two levels of one channel of red, green and blue."""
    return max(high - low for low, high in map(_extrema, image.split()[:3]))


def _extrema(channel: "Image") -> tuple[int, int]:
    low, high = channel.getextrema()
    assert isinstance(low, int)
    assert isinstance(high, int)
    return low, high
