"""Counts duplicates: rows with the same bytes, and images that look the same."""

from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from job.prep.leakage import read_digests
from job.prep.shards import SPLITS, Split, batches, shard_paths

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

NEAR_BITS = 6
"""The most bits, of 256, in which the hashes of similar images differ."""
MAX_COMPARED = 200_000
"""The most images to compare, which bounds memory."""
_STEP = 8  # grey levels; smaller steps are noise from scanners or JPEG
_BANDS = 8
_PAIRS_AT_ONCE = 16_384


def difference_hash(image: "Image") -> bytes:
    """A hash of 16 × 16 bits: whether the image darkens from each cell to its right neighbor.

    Resizing and re-encoding hardly change it.
    """
    import numpy as np
    import PIL.Image

    plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
    small = plain.convert("L").resize((17, 16), PIL.Image.Resampling.BOX)
    cells = np.asarray(small, dtype=np.int16)  # (16, 17)
    return np.packbits(cells[:, :-1] - cells[:, 1:] > _STEP).tobytes()


def count_duplicates(directory: Path) -> dict[str, int]:
    """Counts rows of all splits that repeat an earlier one, and images similar to another."""
    rows = read_digests(directory, SPLITS, "whole")
    rows.sort()  # in place, to save memory
    exact = int((rows[1:] == rows[:-1]).sum())
    del rows
    hashes = _difference_hashes(directory, SPLITS)
    near = count_near_duplicates(hashes)
    return {"exact_rows": exact, "near_images": near, "near_compared": len(hashes)}


def count_near_duplicates(hashes: "np.ndarray") -> int:
    """Counts images similar to an earlier one; `hashes` is (N, 32) bytes.

    Two hashes that differ in few bits agree in at least one of eight bands. Only neighbors in each
    band's order are compared, which keeps the cost at N log N but misses some pairs if many hashes
    share a band.
    """
    import numpy as np

    is_duplicate = np.zeros(len(hashes), dtype=bool)
    words = hashes.view(">u4")  # (N, 8)
    for band in range(_BANDS):
        rotated = [words[:, (band + i) % _BANDS] for i in range(_BANDS)]
        order = np.lexsort(rotated[::-1])
        for start in range(0, len(order) - 1, _PAIRS_AT_ONCE):
            left = order[:-1][start:][:_PAIRS_AT_ONCE]
            right = order[1:][start:][:_PAIRS_AT_ONCE]
            distance = np.bitwise_count(hashes[left] ^ hashes[right]).sum(axis=1)
            is_duplicate[np.maximum(left, right)[distance <= NEAR_BITS]] = True
    return int(is_duplicate.sum())


def _difference_hashes(directory: Path, splits: tuple[Split, ...]) -> "np.ndarray":
    """(N, 32) bytes."""
    import numpy as np

    paths = (shard for split in splits for shard in shard_paths(directory, split))
    columns = (batch.column(0).flatten() for path in paths for batch in batches(path, ["looks"]))
    hashes = bytearray()
    for scalar in islice(chain.from_iterable(columns), MAX_COMPARED):
        hashes += scalar.as_buffer()
    return np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 32)
