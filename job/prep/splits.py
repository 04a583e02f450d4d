"""Decides the split of rows from training sources: which are trained on, which held out."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import islice

from job.prep.leakage import LeakageBy, NormalizeLabel, RowKeys
from job.prep.rows import Reject, Row
from job.prep.shards import SPLITS, Split
from job.spec.types import DataSpec

SAMPLE_ROWS = 512
"""Rows at the start of a source that decide whether its answers repeat."""
_REPEATED = 3  # rows with one answer; two may be one formula in two spellings


def splits_of(spec: DataSpec) -> tuple[Split, ...]:
    """The splits of the spec, in order."""
    return SPLITS if spec.has_validation else ("train", "eval")


def split_of_source(path: str) -> Split:
    """The split of a source by its path in the spec (`DataSpec.sources`)."""
    held_out: dict[str, Split] = {"$.data.eval": "eval", "$.data.validation": "validation"}
    return held_out.get(path, "train")


def takes_fractions(spec: DataSpec) -> bool:
    """Whether fractions of the training rows are held out."""
    return spec.eval is None or spec.validation_fraction > 0


def split_of(split_group: str, spec: DataSpec, seed: int) -> Split:
    """The split of the rows of this group (`RowKeys.split_group`) from a training source.

    Decided by content, not by row number: the split is stable when rows are appended, and
    duplicates are in one split. Grouped by image, the same fraction of each class is held out.
    The two fractions are taken from either end of the range of digests, so changing one moves
    no row into or out of the other.
    """
    digest = hashlib.blake2b(
        f"{seed}:{split_group}".encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    position = int.from_bytes(digest, "big")
    if spec.eval is None and position < spec.eval_fraction * 2**64:
        return "eval"
    if position >= (1 - spec.validation_fraction) * 2**64:
        return "validation"
    return "train"


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
