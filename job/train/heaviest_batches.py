"""The passes of a training that need most memory, found in its own order before it starts."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from statistics import fmean

from job.spec.types import TrainSpec
from job.train.sampler import SPARE, SharedBatches

MOST_ROWS = 2_000_000
"""That are looked through, in some ten seconds: what comes later in a long training is hardly
heavier than all that came before."""


def planned(batches: SharedBatches, train: TrainSpec) -> Iterator[list[int]]:
    """The rows of every pass of the training, in its order: what `Trainer` will ask for."""
    passes = train.gradient_accumulation_steps
    an_epoch = -(-len(batches) // passes)
    left = train.max_steps if train.max_steps > 0 else -(-train.num_train_epochs * an_epoch // 1)
    for epoch in count():
        if left <= 0:
            return
        batches.sampler.set_epoch(epoch)
        yield from islice(batches, int(left) * passes)
        left -= an_epoch


def heaviest(
    passes: Iterable[list[int]], lengths: Sequence[int], patches: Sequence[int]
) -> list[list[int]]:
    """Those of most tokens, of most room for rows padded to the longest, of most patches of
    pictures, and of most tokens and patches together; each once.

    A picture takes its memory in the vision tower, apart from that of the tokens. `lengths` and
    `patches` are those of the rows that the passes name.
    """
    token, patch = fmean(lengths), fmean(patches) or 1.0  # together, by their shares of the mean
    found: list[tuple[float, list[int]]] = [(0.0, [])] * 4
    looked_through = 0
    for named in passes:
        if looked_through > MOST_ROWS:
            break
        looked_through += len(named)
        rows = [max(row, 0) for row in named] if SPARE in named else named
        own = [lengths[row] for row in rows]
        tokens, pictured = sum(own), sum(patches[row] for row in rows)
        together = tokens / token + pictured / patch
        for number, weight in enumerate((tokens, len(own) * max(own), pictured, together)):
            if weight > found[number][0]:
                found[number] = weight, rows
    each: list[list[int]] = []
    for _, rows in found:
        if rows and rows not in each:
            each.append(rows)
    return each
