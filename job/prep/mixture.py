"""Rows of several sources as one: how many of each by their weights, evenly among each other.

The order is worked out, not drawn: at every point of the mixture each source has had its share, and
the same rows always stand in the same order. No row is copied: an order is a list of numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.prep.shards import Split, batches, order_file, shards
from job.spec.types import DataSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """What one source gives to a mixture."""

    source: str
    """Its place in the spec: `data.train[0]`."""
    uri: str
    weight: float | None
    rows: int
    """Rows of it that can be trained."""
    trained: int
    """Rows of it in an epoch, fewer or repeated as its weight asks."""
    held_out: int


def mix(directory: Path, spec: DataSpec) -> list[Ingredient]:
    """Writes the order of what came of the sources beside the shards; gives each one's part in it.

    No row is in the order to train where a source has none left.
    """
    import numpy as np

    parts = range(len(spec.train))
    rows, held_out = (
        [sum(map(_rows, shards(directory, split, part))) for part in parts] for split in _SPLITS
    )
    trained = counts(rows, [source.weight for source in spec.train], spec.stopping_strategy)
    np.save(order_file(directory, "train"), order(rows, trained))
    if spec.eval is None:
        np.save(order_file(directory, "eval"), order(held_out, held_out))
    return [
        Ingredient(
            source=place.removeprefix("$."), uri=source.uri, weight=source.weight,
            rows=rows[n], trained=trained[n], held_out=held_out[n],
        )
        for n, (place, source) in zip(parts, spec.sources().items(), strict=False)
    ]  # fmt: skip


def counts(rows: Sequence[int], weights: Sequence[float | None], strategy: str) -> list[int]:
    """How many rows of each source a mixture holds; every row once where there are no weights."""
    given = [weight for weight in weights if weight is not None]
    if not given or 0 in rows:
        return [0 if 0 in rows else count for count in rows]
    ends = [count / weight for count, weight in zip(rows, given, strict=True)]
    end = min(ends) if strategy == "first_exhausted" else max(ends)
    return [round(end * weight) for weight in given]


def order(rows: Sequence[int], wanted: Sequence[int]) -> "np.ndarray":
    """The numbers of rows, counted through all sources, in the order of the mixture.

    A source's rows stand evenly spread in it, in their own order, and begin again where more are
    wanted than there are.
    """
    import numpy as np

    starts = np.cumsum([0, *rows[:-1]])
    every = list(zip(starts, rows, wanted, strict=True))
    numbers = [start + np.arange(n) % max(1, count) for start, count, n in every]
    times = [(np.arange(n) + 0.5) / max(1, n) for _, _, n in every]
    return np.concatenate(numbers)[np.argsort(np.concatenate(times), kind="stable")]


_SPLITS: tuple[Split, Split] = ("train", "eval")


def _rows(shard: Path) -> int:
    return sum(len(batch) for batch in batches(shard, ["whole"]))
