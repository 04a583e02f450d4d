"""Counts the rows of each split of sources that are small enough to be read at once.

The result is that of prep: `job init` and `job plan` count with it before anything is prepared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from job.prep.leakage import LeakageBy, NormalizeLabel, RowKeys
from job.prep.rows import Row
from job.prep.shards import Split
from job.prep.splits import resolve_leakage_by, split_of, split_of_source, takes_fractions
from job.spec.types import DataSpec


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Rows after leaked ones are removed."""

    train: tuple[int, ...]
    """Of each training source."""
    evaluation: int
    validation: int


@dataclass(frozen=True, kw_only=True)
class _Placed:
    source: str
    keys: RowKeys
    by: LeakageBy
    has_images: bool


def count_splits(
    rows: Mapping[str, Sequence[Row]],
    spec: DataSpec,
    *,
    normalize_label: NormalizeLabel,
    classes: bool,
    seed: int,
) -> SplitCounts:
    """The splits of all `rows`, without rejects, by the path of their source (`DataSpec.sources`).

    `classes` says whether answers are class labels.
    """
    placed: dict[Split, list[_Placed]] = {"train": [], "validation": [], "eval": []}
    found = dict[str, LeakageBy]()
    for path, some in rows.items():
        split = split_of_source(path)
        by: LeakageBy = "image_and_answer"
        if split != "eval":
            by = found[path] = resolve_leakage_by(spec, normalize_label, some, classes=classes)
        for row in some:
            keys = RowKeys(row, normalize_label, by)
            own = split
            if split == "train" and takes_fractions(spec):
                own = split_of(keys.split_group, spec, seed)
            placed[own].append(_Placed(source=path, keys=keys, by=by, has_images=bool(row.images)))
    if spec.leakage == "remove":
        _remove_leaked(placed, compared_by_image="image" in found.values(), spec=spec)
    sources = [path for path in spec.sources() if split_of_source(path) == "train"]
    return SplitCounts(
        train=tuple(sum(each.source == path for each in placed["train"]) for path in sources),
        evaluation=len(placed["eval"]),
        validation=len(placed["validation"]),
    )


def _remove_leaked(
    placed: dict[Split, list[_Placed]], *, compared_by_image: bool, spec: DataSpec
) -> None:
    """As `drop_leaked` does, with what `Totals.validation_by` says of validation rows."""
    judged = {key for each in placed["eval"] for key in each.keys.eval_keys}

    def leaks(each: _Placed) -> bool:
        by_image = compared_by_image if spec.validation is not None else each.by == "image"
        keys = each.keys.eval_keys
        return not judged.isdisjoint(keys[:-1] if by_image and each.has_images else keys)

    kept = [each for each in placed["validation"] if not leaks(each)]
    judged = judged.union(key for each in kept for key in each.keys.eval_keys)
    placed["validation"] = kept
    placed["train"] = [each for each in placed["train"] if judged.isdisjoint(each.keys.train_keys)]
