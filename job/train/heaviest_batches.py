"""Finds the micro-batches that need the most memory, before training starts."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from statistics import fmean

from job.spec.types import TrainSpec
from job.train.sampler import DUMMY_ROW, DistributedBatchSampler

MAX_ROWS = 2_000_000
"""Maximum number of rows to search, which takes about ten seconds: later batches of a long training
are hardly heavier than all earlier ones."""


def planned_batches(batches: DistributedBatchSampler, train: TrainSpec) -> Iterator[list[int]]:
    """The rows of every micro-batch of the training, in the order `Trainer` will request them."""
    accumulation = train.gradient_accumulation_steps
    steps_per_epoch = -(-len(batches) // accumulation)
    steps_left = (
        train.max_steps
        if train.max_steps > 0
        else -(-train.num_train_epochs * steps_per_epoch // 1)
    )
    for epoch in count():
        if steps_left <= 0:
            return
        batches.sampler.set_epoch(epoch)
        yield from islice(batches, int(steps_left) * accumulation)
        steps_left -= steps_per_epoch


def at_most(rows: int, batches: Iterable[list[int]]) -> Iterator[list[int]]:
    """The first batches, until they have that many rows."""
    count = 0
    for batch in batches:
        if count > rows:
            return
        count += len(batch)
        yield batch


def heaviest_batches(
    batches: Iterable[list[int]], lengths: Sequence[int], patches: Sequence[int]
) -> list[list[int]]:
    """The batches with the most tokens, tokens after padding, image patches, and tokens and patches
    combined, without duplicates.

    Images take memory in the vision tower, in addition to that of their tokens. `lengths` and
    `patches` are by row number.
    """
    mean_length, mean_patches = fmean(lengths), fmean(patches) or 1.0
    heaviest: list[tuple[float, list[int]]] = [(0.0, [])] * 4
    for batch in at_most(MAX_ROWS, batches):
        rows = [max(row, 0) for row in batch] if DUMMY_ROW in batch else batch
        row_lengths = [lengths[row] for row in rows]
        tokens, batch_patches = sum(row_lengths), sum(patches[row] for row in rows)
        weights = (
            tokens,
            len(row_lengths) * max(row_lengths),
            batch_patches,
            tokens / mean_length + batch_patches / mean_patches,
        )
        for number, weight in enumerate(weights):
            if weight > heaviest[number][0]:
                heaviest[number] = weight, rows
    distinct: list[list[int]] = []
    for _, rows in heaviest:
        if rows and rows not in distinct:
            distinct.append(rows)
    return distinct
