"""Encodes a sample of the rows: their tokens and patches, and which are rejected."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from job.errors import DataError
from job.evaluation import answer_lengths
from job.evaluation.prompts import questions
from job.families.base import Family
from job.families.encoded import RowSize
from job.prep import sources
from job.prep.convert import to_result
from job.prep.rows import Reject, Row
from job.prep.source_check import check_source
from job.prep.source_files import DataSource
from job.spec.types import DataSpec, JobSpec, SourceSpec
from job.train.length_filter import truncate

ROWS = 64
DRAWN_BATCHES = 1_000
"""Micro-batches to draw: about as many as a longer training has."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The first rows of a source, encoded as training would."""

    read: int
    refused: tuple[Reject, ...]
    too_long: int
    """Rows that training would leave out because of their length."""
    sizes: tuple[RowSize, ...]
    """The sizes of the rows that can be trained on."""
    images: tuple[int, ...]
    """The number of images of each valid row."""
    answers: tuple[int, ...]
    """Tokens of each answer that evaluation would ask for if the row were held out."""
    stored_bytes: int
    """The size of the rows in prepared shards, nearly all of it images."""

    @property
    def bytes_per_row(self) -> float:
        return self.stored_bytes / max(1, self.read)

    def of_rows(self, *, without_refused: bool) -> tuple[float, float]:
        """The share of the source's rows that can be trained on, and the trained tokens per row;
        the others count as 0. `without_refused` leaves refused rows out of both."""
        rows = max(1, self.read - (len(self.refused) if without_refused else 0))
        return len(self.sizes) / rows, sum(size.tokens for size in self.sizes) / rows


def first_rows(
    source: DataSource, source_spec: SourceSpec, field: str, spec: DataSpec
) -> Iterator[Row | Reject]:
    """The sample, as prep reads it: images are inspected, not decoded for the model.

    Raises DataError if a column that the spec maps does not exist.
    """
    few = replace(source_spec, limit=min(ROWS, source_spec.limit or ROWS), shuffle_seed=None)
    reading = check_source(source, few, spec, field)
    for record in sources.read(source, few):
        yield to_result(record, reading)


def sample_source(
    source: DataSource, source_spec: SourceSpec, field: str, family: Family, spec: JobSpec
) -> Sample:
    """Reads and encodes the sample. Raises the errors of `first_rows`."""
    read = too_long = stored = 0
    refused: list[Reject] = []
    sizes: list[RowSize] = []
    images: list[int] = []
    answers: list[str] = []
    for row in first_rows(source, source_spec, field, spec.data):
        read += 1
        size = _size(row, family, spec) if isinstance(row, Row) else row
        if isinstance(row, Row):
            images.append(len(row.images))
            stored += sum(len(image.data) for image in row.images)
            answers += [each.label for each in questions([row], spec.eval.turns)]
        if isinstance(size, Reject):
            refused.append(size)
        elif size is None:
            too_long += 1
        else:
            sizes.append(size)
    return Sample(
        read=read,
        refused=tuple(refused),
        too_long=too_long,
        sizes=tuple(sizes),
        images=tuple(images),
        answers=tuple(answer_lengths.tokens(family.processor.tokenizer, answers)),
        stored_bytes=stored,
    )


def _size(row: Row, family: Family, spec: JobSpec) -> RowSize | Reject | None:
    """The row's size; None if it is too long to train."""
    try:
        encoded = truncate(family.encode(row), family, spec.data, spec.train)
    except DataError as error:
        return Reject(id=row.id, reason=error.problems[0].message)
    return family.row_size(encoded) if encoded else None


def worst_batch(sizes: Sequence[RowSize], rows: int) -> tuple[RowSize, ...]:
    """The heaviest of `DRAWN_BATCHES` micro-batches of `rows` rows generated from the sample.

    A row's weight is its tokens and patches relative to their means. The result is deterministic.
    One row is made a token shorter, because rows of different lengths take extra copies to pack.
    """
    tokens = fmean(size.tokens for size in sizes)
    patches = fmean(sum(size.patches) for size in sizes) or 1.0
    weights = [size.tokens / tokens + sum(size.patches) / patches for size in sizes]
    draw, numbers = random.Random(0), range(len(sizes))  # noqa: S311 - nothing is secret here
    batches = (draw.choices(numbers, k=rows) for _ in range(DRAWN_BATCHES))
    *others, last = max(batches, key=lambda batch: sum(weights[number] for number in batch))
    shorter = replace(sizes[last], tokens=sizes[last].tokens - (rows > 1))
    return (*(sizes[number] for number in others), shorter)
