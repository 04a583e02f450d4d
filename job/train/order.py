"""The order of rows: one for the whole job, however many processes share it.

A pass over the rows is one shuffled list. Each forward pass of all processes takes the next piece
of it, and each process its part of the piece, so that the rows of an optimizer step are the same
whether they are taken by one process or by several, at once or one after another.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import torch
from accelerate.data_loader import SeedableRandomSampler

SPARE = -1
"""Stands for a row that is computed and not counted: a process without rows must keep step."""


class SharedBatches:
    """A batch sampler: the batches, as lists of row numbers, of one of `processes`.

    Every process has equally many. Where the rows of the last piece do not reach all of them, the
    others have `[SPARE]`.
    """

    def __init__(
        self,
        sampler: "SeedableRandomSampler | Windows",
        batch_size: int,
        *,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """`sampler` gives the order of an epoch."""
        self.batch_size = batch_size
        # Trainer's loader sets the epoch of what it finds under this name.
        self.sampler = sampler
        self._rows, self._process, self._processes = len(sampler), process, processes

    def __len__(self) -> int:
        return -(-self._rows // (self.batch_size * self._processes))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        width = self.batch_size
        for start in range(0, len(order), width * self._processes):
            first = start + width * self._process
            yield order[first : first + width] or [SPARE]


def shuffled(rows: int, seed: int) -> SeedableRandomSampler:
    """All rows in any order, another in every epoch."""
    return SeedableRandomSampler(range(rows), data_seed=seed)


class Windows:
    """A sampler that shuffles the blocks of a data set, and then the rows of a few blocks together.

    A row that lies far from its neighbours is expensive where blocks are fetched; here the rows of
    a block follow each other closely.
    """

    def __init__(self, rows: int, starts: Sequence[int], buffer_size: int, *, seed: int) -> None:
        """`starts` are the numbers of each block's first row; `buffer_size` rows, in whole blocks,
        are shuffled together."""
        assert rows, "an order of no rows"
        self._rows, self._seed, self.epoch = rows, seed, 0
        ends = [*(start for start in sorted(set(starts)) if 0 < start < rows), rows]
        self._blocks = [range(*bounds) for bounds in pairwise([0, *ends])]
        self._together = max(1, buffer_size * len(self._blocks) // rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        blocks = torch.randperm(len(self._blocks), generator=generator).tolist()
        for first in range(0, len(blocks), self._together):
            window = blocks[first : first + self._together]
            rows = list(chain.from_iterable(self._blocks[block] for block in window))
            places = torch.randperm(len(rows), generator=generator).tolist()
            yield from (rows[place] for place in places)
