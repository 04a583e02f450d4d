"""Decides which rows are held out if the spec names no evaluation source."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import islice

from job.prep.leakage import LeakageBy, NormalizeLabel, RowKeys
from job.prep.rows import Reject, Row
from job.spec.types import DataSpec

SAMPLE_ROWS = 512
"""Rows at the start of a source that decide whether its answers repeat."""
_REPEATED = 3  # rows with one answer; two may be one formula in two spellings


def is_held_out(split_group: str, *, fraction: float, seed: int) -> bool:
    """Whether the rows of this group (`RowKeys.split_group`) belong to the evaluation split.

    Decided by content, not by row number: the split is stable when rows are appended, and
    duplicates are in one split. Grouped by image, the same fraction of each class is held out.
    """
    digest = hashlib.blake2b(
        f"{seed}:{split_group}".encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def resolve_leakage_by(
    spec: DataSpec,
    normalize_label: NormalizeLabel,
    first: Iterable[Row | Reject],
    *,
    classes: bool,
) -> LeakageBy:
    """Resolves `data.leakage_by: auto` for a source that begins with the rows `first`.

    Answers that are classes, or shared by most rows, must not decide the split: whole classes would
    be held out, or dropped as leaked. Appending rows of the same kind does not change the result.
    """
    if spec.leakage_by != "auto":
        return spec.leakage_by
    if classes:
        return "image"
    with_images = (row for row in first if isinstance(row, Row) and row.images)
    groups = (
        RowKeys(row, normalize_label, "image_and_answer").split_group
        for row in islice(with_images, SAMPLE_ROWS)
    )
    # Hashed, as questions may be long.
    return "image" if answers_repeat(Counter(map(hash, groups)).values()) else "image_and_answer"


def answers_repeat(counts: Collection[int]) -> bool:
    """Whether most rows share their answer with others; `counts` has the rows of each answer."""
    return 2 * sum(count for count in counts if count >= _REPEATED) > sum(counts)
