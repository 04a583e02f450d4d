"""Filters rows by their length in tokens: rows over `max_length` are truncated or dropped."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

from job import log
from job.errors import DataError, Problem
from job.families.base import Family
from job.families.encoded import IGNORED, Encoded, RowSize
from job.prep.rows import Row
from job.spec.types import DataSpec, TrainSpec
from job.train.row_sizes import RowSizes

_ROWS_PER_TASK = 64
_MIN_ROWS_FOR_WORKERS = 10_000  # fewer rows are measured before worker processes have started
_MAX_PROBLEMS = 20  # rejected rows that the error lists


@dataclass(frozen=True, kw_only=True)
class FilteredRows:
    """The rows to train on, as indices into all rows."""

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    """Number of tokens of each kept row, after truncation."""
    patches: tuple[int, ...]
    """Number of image patches of each kept row; of image tokens if the family cannot tell."""
    sizes: RowSizes
    """All sizes of each kept row."""
    dropped: int
    token_counts: Counter[int]
    """Number of rows by length in tokens, before truncation; includes dropped rows."""

    def starts(self, blocks: Sequence[int]) -> list[int]:
        """The index among the kept rows at which each block begins; `blocks` has the blocks' first
        rows among all rows."""
        return [bisect_left(self.indices, first) for first in blocks]


def filter_by_length(
    rows: Sequence[Row],
    family: Family,
    data: DataSpec,
    train: TrainSpec,
    *,
    split: Literal["training", "validation"] = "training",
) -> FilteredRows:
    """Measures all rows and keeps those within `max_length`; decodes no image.

    Raises DataError, listing the rows, if the family rejects any, or if no row is left.
    """
    from torch.utils.data import DataLoader

    indices, lengths, patches = [], [], []
    sizes = RowSizes()
    token_counts: Counter[int] = Counter()
    rejected: list[Problem] = []
    loader: DataLoader[list[RowLength | DataError]] = DataLoader(
        _RowLengths(rows, family, lambda row: truncate(row, family, data, train)),  # type: ignore[arg-type]
        batch_size=_ROWS_PER_TASK,
        num_workers=train.dataloader_num_workers if len(rows) >= _MIN_ROWS_FOR_WORKERS else 0,
        collate_fn=list,
    )
    with log.progress("measure rows", len(rows)) as bar:
        for number, length in enumerate(chain.from_iterable(loader)):
            bar.advance()
            if isinstance(length, DataError):
                rejected += length.problems
                continue
            token_counts[length.tokens] += 1
            if (size := length.truncated) is not None:
                indices.append(number)
                lengths.append(size.tokens)
                patches.append(sum(size.patches) or size.image_tokens)
                sizes.append(size)
    if rejected:
        raise _rejection(rejected)
    if not indices:
        raise DataError(
            "$.train.max_length",
            f"all {len(rows)} {split} rows are longer",
            value=train.max_length,
            fix="raise max_length, or lower data.max_pixels",
        )
    return FilteredRows(
        indices=tuple(indices),
        lengths=tuple(lengths),
        patches=tuple(patches),
        sizes=sizes,
        dropped=len(rows) - len(indices),
        token_counts=token_counts,
    )


def truncate(encoded: Encoded, family: Family, data: DataSpec, train: TrainSpec) -> Encoded | None:
    """The row, truncated to `max_length` if necessary; None if it is dropped.

    Image tokens are never cut, because their number has to match the image.
    """
    excess = len(encoded.input_ids) - train.max_length
    if excess <= 0:
        return encoded
    if data.truncation_strategy == "delete":
        return None
    cuttable = [i for i, token in enumerate(encoded.input_ids) if not family.is_image_token(token)]
    if len(cuttable) < excess:
        return None
    cut = set(cuttable[:excess] if data.truncation_strategy == "left" else cuttable[-excess:])
    kept = [i for i in range(len(encoded.input_ids)) if i not in cut]
    labels = tuple(encoded.labels[i] for i in kept)
    if all(label == IGNORED for label in labels):
        return None
    return Encoded(
        id=encoded.id,
        input_ids=tuple(encoded.input_ids[i] for i in kept),
        labels=labels,
        images=encoded.images,
    )


class RowLength(NamedTuple):
    tokens: int
    """Before truncation."""
    truncated: RowSize | None
    """After truncation; None if the row is dropped."""


class _RowLengths:
    """A map-style dataset of row lengths.

    Errors are returned, because DataLoader changes the type of exceptions raised in workers.
    """

    def __init__(
        self, rows: Sequence[Row], family: Family, cut: Callable[[Encoded], Encoded | None]
    ) -> None:
        self._rows, self._family, self._cut = rows, family, cut

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RowLength | DataError:
        try:
            encoded = self._family.encode(self._rows[index])
        except DataError as error:
            return error
        tokens, truncated = len(encoded.input_ids), self._cut(encoded)
        if truncated is None:
            return RowLength(tokens, None)
        return RowLength(tokens, self._family.row_size(truncated))


def _rejection(rejected: list[Problem]) -> DataError:
    listed = rejected[:_MAX_PROBLEMS]
    if more := len(rejected) - len(listed):
        listed.append(Problem("…", f"and {more} more rows that the model rejects"))
    return DataError.from_problems(listed)
