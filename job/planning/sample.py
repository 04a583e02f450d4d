"""What rows weigh, from a sample of them: tokens, pixels, and what would be refused."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from job.errors import DataError
from job.evaluation import answer_lengths
from job.evaluation.prompts import questions
from job.families.base import Family, RowSize
from job.prep import sources
from job.prep.convert import to_result
from job.prep.rows import Reject, Row
from job.prep.source_check import check_source
from job.prep.source_files import DataSource
from job.spec.types import JobSpec, SourceSpec
from job.train.length_filter import truncate

ROWS = 64
DRAWN = 1_000
"""Passes: as many as a training of some length comes to."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The first rows of a source, encoded as training would."""

    read: int
    refused: tuple[Reject, ...]
    too_long: int
    """Rows that training would leave out for their length."""
    sizes: tuple[RowSize, ...]
    """Of the rows that would train."""
    images: tuple[int, ...]
    """Of each row that can be used."""
    answers: tuple[int, ...]
    """Tokens of each answer that would be asked for, were the row held out."""
    stored_bytes: int
    """What the rows read take in prepared shards: nearly all of it is pictures."""

    @property
    def tokens(self) -> float:
        """Tokens that a row of the source brings to training, those that do not train included."""
        return sum(size.tokens for size in self.sizes) / max(1, self.read)

    @property
    def usable_share(self) -> float:
        return len(self.sizes) / max(1, self.read)


def take(
    source: DataSource, given: SourceSpec, place: str, family: Family, spec: JobSpec
) -> Sample:
    """Reads and encodes the sample; pictures are looked at, none is decoded for the model.

    Raises DataError where the columns that the spec maps are not there.
    """
    few = replace(given, limit=min(ROWS, given.limit or ROWS), shuffle_seed=None)
    options = check_source(source, few, spec.data, place)
    read = too_long = stored = 0
    refused: list[Reject] = []
    sizes: list[RowSize] = []
    images: list[int] = []
    answers: list[str] = []
    for record in sources.read(source, few):
        read += 1
        row = to_result(record, options)
        found = _size(row, family, spec) if isinstance(row, Row) else row
        if isinstance(row, Row):
            images.append(len(row.images))
            stored += sum(len(image.data) for image in row.images)
            answers += [each.label for each in questions([row], spec.eval.turns)]
        if isinstance(found, Reject):
            refused.append(found)
        elif found is None:
            too_long += 1
        else:
            sizes.append(found)
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
    try:
        fitted = truncate(family.encode(row), family, spec.data, spec.train)
    except DataError as error:
        return Reject(id=row.id, reason=error.problems[0].message)
    return family.row_size(fitted) if fitted else None


def worst_batch(sizes: Sequence[RowSize], rows: int) -> tuple[RowSize, ...]:
    """The heaviest of `DRAWN` passes of `rows` rows drawn from the sample, by its share of the mean
    tokens and the mean patches. The same sample gives the same pass.

    One row is a token shorter, as no two rows of real data are of one length: packing them into a
    grid then takes copies.
    """
    token = fmean(size.tokens for size in sizes)
    patch = fmean(sum(size.patches) for size in sizes) or 1.0
    weights = [size.tokens / token + sum(size.patches) / patch for size in sizes]
    draw, numbers = random.Random(0), range(len(sizes))  # noqa: S311 - nothing is secret here
    passes = (draw.choices(numbers, k=rows) for _ in range(DRAWN))
    *others, last = max(passes, key=lambda drawn: sum(weights[number] for number in drawn))
    shorter = replace(sizes[last], tokens=sizes[last].tokens - (rows > 1))
    return (*(sizes[number] for number in others), shorter)
