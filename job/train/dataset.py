"""The training dataset and its collator: rows are tokenized on access."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from job.errors import DataError, JobError
from job.families.base import Family
from job.families.batches import MicroBatch
from job.families.encoded import IGNORED, Encoded
from job.families.packed_shape import PackedShape
from job.prep.rows import Row
from job.train.buckets import Buckets
from job.train.length_filter import FilteredRows
from job.train.row_sizes import RowSizes
from job.train.sampler import DUMMY_ROW


class EncodedDataset:
    """A map-style dataset; each row is tokenized on access."""

    def __init__(
        self,
        rows: Sequence[Row],
        filtered: FilteredRows,
        encode: Callable[[Row], Encoded | None],
    ) -> None:
        self._rows, self._filtered, self._encode = rows, filtered, encode

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each row."""
        return self._filtered.lengths

    @property
    def patches(self) -> tuple[int, ...]:
        """Number of image patches of each row."""
        return self._filtered.patches

    @property
    def sizes(self) -> RowSizes:
        return self._filtered.sizes

    def __len__(self) -> int:
        return len(self._filtered.indices)

    def __getitem__(self, index: int) -> "Encoded | DummyRow | JobError":
        """The row of that number; for `DUMMY_ROW`, a dummy copy of the first row.

        Errors are returned, because DataLoader changes the type of exceptions raised in workers.
        """
        try:
            return DummyRow(self.row(0)) if index == DUMMY_ROW else self.row(index)
        except JobError as error:
            return error

    def row(self, index: int) -> Encoded:
        encoded = self._encode(self._rows[self._filtered.indices[index]])
        assert encoded is not None, "the filter kept a row that does not fit"
        return encoded


@dataclass(frozen=True)
class DummyRow:
    """A row that keeps ranks in lockstep; excluded from the loss."""

    row: Encoded


class Collator:
    """The family's collator; adds token counts for the loss and the throughput.

    If a micro-batch cannot be built, its only key is the error.
    """

    def __init__(
        self, family: Family, *, padding_free: bool, buckets: Buckets | None = None
    ) -> None:
        """`buckets` are shapes to pad packed micro-batches to, if they fit into one."""
        self._family, self._padding_free, self._buckets = family, padding_free, buckets

    def __call__(self, items: "list[Encoded | DummyRow | JobError]") -> MicroBatch:
        rows: list[Encoded | DummyRow] = []
        for item in items:
            if isinstance(item, JobError):
                return {"failed": item}
            rows.append(item)
        try:
            return self.batch(rows)
        except DataError as error:
            return {"failed": error}

    def batch(self, items: "Sequence[Encoded | DummyRow]") -> MicroBatch:
        """Collates these rows. Raises DataError if none of them has a supervised token."""
        rows = [item.row if isinstance(item, DummyRow) else item for item in items]
        real = [item for item in items if isinstance(item, Encoded)]
        if not any(row.supervised_tokens for row in rows):
            raise DataError(
                ", ".join(row.id for row in rows),
                "a batch has no trained token",
                fix="these rows have no answer left within max_length; "
                "set data.truncation_strategy: delete",
            )
        # The first token has no prediction: labels are shifted by one.
        counted = sum(label != IGNORED for row in real for label in row.labels[1:])
        tokens = sum(len(row.input_ids) for row in real)
        added = {
            "counted_tokens": counted,
            "tokens": tokens,
            "images": sum(len(row.images) for row in real),
        }
        return cast(MicroBatch, {**self._collated(rows), **added})

    def _collated(self, rows: Sequence[Encoded]) -> Mapping[str, object]:
        if not self._padding_free:
            return self._family.collate(rows)
        number = None
        if self._buckets is not None:
            number = self._buckets.of(PackedShape.of(map(self._family.row_size, rows)))
        if self._buckets is None or number is None:
            return self._family.pack(rows)
        return {**self._family.pack(rows, self._buckets.shapes[number]), "bucket": number}
