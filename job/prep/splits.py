"""Which rows train and which are held out, where the spec names no evaluation source."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import islice

from job.prep.leakage import By, Compared, LabelKey
from job.prep.rows import Reject, Row
from job.spec.types import DataSpec

SAMPLE = 512
"""Rows at the beginning of a source by which it is told whether its answers repeat."""
_COMMON = 3  # rows with one answer: two may be one formula in two spellings


def held_out(group: str, *, fraction: float, seed: int) -> bool:
    """Whether the rows of this group (`Compared.group`) belong to the evaluation split.

    By their content and not by their number: the split stays put when rows are appended, and
    duplicates fall on one side. Grouped by their images, rows of each class are held out by the
    same fraction.
    """
    place = hashlib.blake2b(
        f"{seed}:{group}".encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(place, "big") < fraction * 2**64


def kept_apart_by(
    spec: DataSpec, label_key: LabelKey, first: Iterable[Row | Reject], *, classes: bool
) -> By:
    """What `data.leakage_by` means for a source that begins with the rows `first`.

    Answers that are classes, or that most rows share with others, are no reason to keep rows apart:
    whole classes would be held out, or left out as leaked. More rows of the same kind only repeat
    more, so appended rows do not turn this back.
    """
    if spec.leakage_by != "auto":
        return spec.leakage_by
    if classes:
        return "image"
    shown = (row for row in first if isinstance(row, Row) and row.images)
    groups = (Compared(row, label_key, "image_and_answer").group for row in islice(shown, SAMPLE))
    # Digests, as questions may be long.
    return "image" if repeat(Counter(map(hash, groups)).values()) else "image_and_answer"


def repeat(counts: Collection[int]) -> bool:
    """Whether most rows have an answer that others have too, by how many rows have each."""
    return 2 * sum(count for count in counts if count >= _COMMON) > sum(counts)
