"""Embeds images in the page as data URLs."""

import base64
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

DENSITY = 2
"""Device pixels per page pixel in rendered answers, for high-density screens."""
_MAX_WIDTH, _MAX_HEIGHT = 760, 480  # in pixels of the page
_MAX_PNG_BYTES = 48_000


@dataclass(frozen=True, kw_only=True)
class EmbeddedImage:
    uri: str
    """`data:image/…;base64,…`"""
    width: int
    height: int
    """In pixels of the page."""


@dataclass
class ImageEmbedder:
    """Embeds images until `budget` bytes are used up."""

    budget: int
    omitted: int = field(default=0, init=False)

    def embed(self, image: "Image", density: int = 1) -> EmbeddedImage | None:
        """Scales down and re-encodes the image, which drops its metadata; None if over budget."""
        image.thumbnail((_MAX_WIDTH * density, _MAX_HEIGHT * density))
        gray = image.convert("L")
        # Most formulas are gray, and gray images take a third of the bytes.
        if image.mode != "L" and gray.convert(image.mode).tobytes() == image.tobytes():
            image = gray
        data, kind = _encoded(image, "PNG"), "png"
        if len(data) > _MAX_PNG_BYTES:
            data, kind = _encoded(image, "JPEG"), "jpeg"
        if len(data) > self.budget:
            self.omitted += 1
            return None
        self.budget -= len(data)
        uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        width, height = (max(1, round(side / density)) for side in image.size)
        return EmbeddedImage(uri=uri, width=width, height=height)


def _encoded(image: "Image", kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 80} if kind == "JPEG" else {"optimize": True}))
    return out.getvalue()
