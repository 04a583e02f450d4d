"""The order of rows: one for the whole job, however many processes share it.

A pass over the rows is one shuffled list. Each optimizer step takes the next piece of it and
divides it among its forward passes, over all processes, so that the rows of a step are the same
whether they are taken by one process or by several, at once or one after another.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import torch
from accelerate.data_loader import SeedableRandomSampler

from job.train.micro_batches import Cut, in_order

SPARE = -1
"""Stands for a row that is computed and not counted: a process without rows must keep step."""


class SharedBatches:
    """A batch sampler: the batches, as lists of row numbers, of one of `processes`.

    Every process has equally many. Where the rows of the last step do not reach all of them, the
    others have `[SPARE]`.
    """

    def __init__(
        self,
        sampler: "SeedableRandomSampler | Windows",
        batch_size: int,
        *,
        passes: int = 1,
        process: int = 0,
        processes: int = 1,
        cut: Cut | None = None,
    ) -> None:
        """`sampler` gives the order of an epoch.

        A step has `passes` batches of each process; `cut` divides its rows, by default in order. A
        batch has `batch_size` rows, unless the cut gives it more or fewer.
        """
        self.batch_size = batch_size
        # Trainer's loader sets the epoch of what it finds under this name.
        self.sampler = sampler
        self._rows, self._passes = len(sampler), passes
        self._process, self._processes = process, processes
        self._cut = cut or in_order(batch_size)

    def __len__(self) -> int:
        return -(-self._rows // (self.batch_size * self._processes))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        at_once = self.batch_size * self._processes
        for start in range(0, len(order), at_once * self._passes):
            rows = order[start : start + at_once * self._passes]
            passes = -(-len(rows) // at_once)
            pieces = self._cut(rows, passes, self._processes)
            for piece in pieces[self._process :: self._processes]:
                yield piece or [SPARE]


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
