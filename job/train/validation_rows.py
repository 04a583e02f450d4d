"""The rows to validate on, divided among processes and batches."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from job import log
from job.distributed import process_group
from job.families.held_out_loss import length_batches
from job.prep.rows import Row
from job.train.dataset import EncodedDataset
from job.train.length_filter import filter_by_length
from job.train.sampler import DUMMY_ROW
from job.train.train_context import TrainContext
from job.train.training_rows import encode_truncated


@dataclass(frozen=True, kw_only=True)
class ValidationRows:
    rows: Sequence[Row]
    """Those within `max_length`."""
    dataset: EncodedDataset
    dropped: int
    """Rows over `max_length`."""

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, tokens: int = 0) -> list[list[int]]:
        """This process's batches of row numbers, longest rows first: `size` rows, or more up to
        `tokens`.

        All processes have the same number of them; some may be `[DUMMY_ROW]`.
        """
        batches = length_batches(self.dataset.lengths, rows=size, tokens=tokens)
        rank, processes = process_group.rank(), process_group.size()
        own = batches[rank::processes]
        return own + [[DUMMY_ROW]] * (-(-len(batches) // processes) - len(own))

    def of_rank(self, rank: int) -> list[Row]:
        """The rows to which a process generates answers."""
        return [self.rows[n] for n in range(rank, len(self.rows), process_group.size())]


def select_validation_rows(context: TrainContext) -> ValidationRows | None:
    """The first `eval.validation_samples` validation rows, filtered by length as training rows are;
    None if the spec does not validate.

    Raises DataError if no row is left.
    """
    spec = context.spec
    if not spec.train.validates:
        return None
    rows = _first(context.data.rows("validation"), spec.eval.validation_samples)
    filtered = filter_by_length(rows, context.family, spec.data, spec.train, split="validation")
    encode = functools.partial(encode_truncated, family=context.family, spec=spec)
    train = spec.train
    log.info(
        "validation",
        rows=len(filtered.indices),
        over_max_length=filtered.dropped,
        every=f"{train.validation_steps} steps" if train.eval_strategy == "steps" else "epoch",
        metric=f"eval_{train.best_metric}",
        generates_answers=train.generates_answers,
    )
    return ValidationRows(
        rows=_Selected(rows, filtered.indices),
        dataset=EncodedDataset(rows, filtered, encode),
        dropped=filtered.dropped,
    )


class _Selected(Sequence[Row]):
    """Rows of a sequence by their numbers, read on access."""

    def __init__(self, rows: Sequence[Row], indices: Sequence[int]) -> None:
        self._rows, self._indices = rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> "Sequence[Row]": ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return _Selected(self._rows, self._indices[index])
        return self._rows[self._indices[index]]

    def __iter__(self) -> Iterator[Row]:
        return (self._rows[index] for index in self._indices)


def _first(rows: Sequence[Row], count: int) -> Sequence[Row]:
    return _Selected(rows, range(min(len(rows), count)))
