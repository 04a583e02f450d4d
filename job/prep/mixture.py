"""Mixes several sources: how many rows of each by weight, evenly interleaved.

The order is deterministic: every part of it contains each source in proportion. Rows are not
copied; the order is an array of row numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.prep.shards import SPLITS, count_rows, order_file, shard_paths
from job.spec.types import DataSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """One source's part of a mixture; an item of `sources` in `stats.json`."""

    source: str
    """Its path in the spec: `data.train[0]`."""
    uri: str
    weight: float | None
    rows: int
    """Rows available for training."""
    trained: int
    """Rows per epoch: fewer, or repeated, depending on weights."""
    held_out: int
    validation: int | None = None
    """Rows to validate on; None unless a fraction of each source is."""

    def to_json(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if name != "validation"} | (
            {} if self.validation is None else {"validation": self.validation}
        )


def write_mixture(directory: Path, spec: DataSpec) -> list[SourceShare]:
    """Writes the order of the mixture beside the shards; returns each source's share.

    The training order is empty if a source has no rows left.
    """
    import numpy as np

    indices = range(len(spec.train))
    rows, held_out, validation = (
        [sum(map(count_rows, shard_paths(directory, split, index))) for index in indices]
        for split in SPLITS
    )
    trained = epoch_rows(rows, [source.weight for source in spec.train], spec.stopping_strategy)
    np.save(order_file(directory, "train"), interleave(rows, trained))
    if spec.eval is None:
        np.save(order_file(directory, "eval"), interleave(held_out, held_out))
    validates = spec.validation_fraction > 0
    if validates:
        np.save(order_file(directory, "validation"), interleave(validation, validation))
    return [
        SourceShare(
            source=path.removeprefix("$."), uri=source.uri, weight=source.weight,
            rows=rows[n], trained=trained[n], held_out=held_out[n],
            validation=validation[n] if validates else None,
        )
        for n, (path, source) in zip(indices, spec.sources().items(), strict=False)
    ]  # fmt: skip


def epoch_rows(rows: Sequence[int], weights: Sequence[float | None], strategy: str) -> list[int]:
    """The number of rows of each source per epoch; without weights, each row once."""
    given = [weight for weight in weights if weight is not None]
    if not given or 0 in rows:
        return [0 if 0 in rows else count for count in rows]
    ends = [count / weight for count, weight in zip(rows, given, strict=True)]
    end = min(ends) if strategy == "first_exhausted" else max(ends)
    return [round(end * weight) for weight in given]


def interleave(rows: Sequence[int], wanted: Sequence[int]) -> "np.ndarray":
    """The order of the mixture: row numbers counted over all sources, (sum(wanted),).

    Each source's rows are spread evenly, in their own order, and start over if more are wanted
    than there are.
    """
    import numpy as np

    starts = np.cumsum([0, *rows[:-1]])
    sources = list(zip(starts, rows, wanted, strict=True))
    numbers = [start + np.arange(n) % max(1, count) for start, count, n in sources]
    times = [(np.arange(n) + 0.5) / max(1, n) for _, _, n in sources]
    return np.concatenate(numbers)[np.argsort(np.concatenate(times), kind="stable")]
