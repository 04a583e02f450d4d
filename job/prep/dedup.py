"""Rows that are there twice: the same bytes, or pictures that look the same."""

from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from job.prep.leakage import digests
from job.prep.shards import Split, batches, shards

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

NEAR_BITS = 6
"""Of 256: as many may differ between two pictures that count as looking the same."""
COMPARED = 200_000
"""Pictures compared by their looks at most, so that memory stays bounded."""
_STEP = 8  # grey levels: less is noise of a scanner or of JPEG
_BANDS = 8
_AT_ONCE = 16_384  # pairs compared together


def look(image: "Image") -> bytes:
    """A difference hash: 16 × 16 bits, each whether the picture darkens from one cell to the next.

    It survives another size, format and quality.
    """
    import numpy as np
    import PIL.Image

    plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
    small = plain.convert("L").resize((17, 16), PIL.Image.Resampling.BOX)
    cells = np.asarray(small, dtype=np.int16)  # (16, 17)
    return np.packbits(cells[:, :-1] - cells[:, 1:] > _STEP).tobytes()


def duplicates(directory: Path) -> dict[str, int]:
    """How many rows of both splits are there already, and how many pictures look like another."""

    splits: tuple[Split, ...] = ("train", "eval")
    every = digests(directory, splits, "whole")
    every.sort()  # in place: of a million rows it is the largest thing in memory
    exact = int((every[1:] == every[:-1]).sum())
    del every
    looks = _looks(directory, splits)
    return {"exact_rows": exact, "near_images": near(looks), "near_compared": len(looks)}


def near(looks: "np.ndarray") -> int:
    """How many of the pictures look like an earlier one; `looks` is (N, 32) bytes.

    Two that differ in few bits agree in one of eight bands at least. Only neighbours in each
    band's order are compared, so that the cost stays N log N; of many that crowd in one band some
    pairs are missed.
    """
    import numpy as np

    found = np.zeros(len(looks), dtype=bool)
    words = looks.view(">u4")  # (N, 8)
    for band in range(_BANDS):
        others = [words[:, (band + i) % _BANDS] for i in range(_BANDS)]
        order = np.lexsort(others[::-1])
        for start in range(0, len(order) - 1, _AT_ONCE):
            left, right = order[:-1][start:][:_AT_ONCE], order[1:][start:][:_AT_ONCE]
            distance = np.bitwise_count(looks[left] ^ looks[right]).sum(axis=1)
            found[np.maximum(left, right)[distance <= NEAR_BITS]] = True
    return int(found.sum())


def _looks(directory: Path, splits: tuple[Split, ...]) -> "np.ndarray":
    import numpy as np

    paths = (shard for split in splits for shard in shards(directory, split))
    columns = (batch.column(0).flatten() for path in paths for batch in batches(path, ["looks"]))
    found = bytearray()
    for seen in islice(chain.from_iterable(columns), COMPARED):
        found += seen.as_buffer()
    return np.frombuffer(found, dtype=np.uint8).reshape(-1, 32)
