"""Images of noise and random answers, with the sizes of real formulas (im2latex_sizes.json)."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

SIZES = Path(__file__).with_name("im2latex_sizes.json")


def noise_formulas(count: int, letters: str) -> Iterator[tuple[bytes, str]]:
    """PNG files and answers of these letters; the same each time."""
    import numpy as np
    from PIL import Image

    sizes = json.loads(SIZES.read_text())["rows"]
    noise = np.random.default_rng(0)
    for number in range(count):
        width, height, characters = sizes[number % len(sizes)]
        file = io.BytesIO()
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        yield file.getvalue(), "".join(noise.choice(list(letters), max(1, characters // 2)))
