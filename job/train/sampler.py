"""Samplers: the row order does not depend on the number of processes or micro-batches.

An epoch is one shuffled list of rows, shared by all processes. Each optimizer step takes the next
rows of that list and divides them among processes and micro-batches.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import torch
from accelerate.data_loader import SeedableRandomSampler

from job.train.micro_batches import Split, in_order

DUMMY_ROW = -1
"""Stands for a dummy row, which keeps ranks in lockstep; excluded from the loss."""


class DistributedBatchSampler:
    """The micro-batches of one process, as lists of row numbers.

    All processes have the same number of them: if the last step has too few rows, some are
    `[DUMMY_ROW]`.
    """

    def __init__(
        self,
        sampler: "SeedableRandomSampler | BlockShuffleSampler",
        batch_size: int,
        *,
        micro_batches: int = 1,
        rank: int = 0,
        processes: int = 1,
        split: Split | None = None,
    ) -> None:
        """`sampler` yields the rows of an epoch.

        Each process has `micro_batches` in a step; `split` divides the step's rows among all of
        them, by default in order, `batch_size` rows each.
        """
        self.batch_size = batch_size
        # Accelerate's loader calls `set_epoch` on the attribute of this name.
        self.sampler = sampler
        self._rows, self._micro_batches = len(sampler), micro_batches
        self._rank, self._processes = rank, processes
        self._split = split or in_order(batch_size)

    def __len__(self) -> int:
        return -(-self._rows // (self.batch_size * self._processes))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        at_once = self.batch_size * self._processes
        for start in range(0, len(order), at_once * self._micro_batches):
            rows = order[start : start + at_once * self._micro_batches]
            parts = self._split(rows, -(-len(rows) // at_once), self._processes)
            for part in parts[self._rank :: self._processes]:
                yield part or [DUMMY_ROW]


def shuffled(rows: int, seed: int) -> SeedableRandomSampler:
    """All rows, reshuffled in every epoch."""
    return SeedableRandomSampler(range(rows), data_seed=seed)


class BlockShuffleSampler:
    """Shuffles the blocks of a dataset, then the rows within a window of a few blocks.

    For blocks that are downloaded when needed: the rows of a block stay close together, because
    random access to single rows would be expensive.
    """

    def __init__(self, rows: int, starts: Sequence[int], buffer_size: int, *, seed: int) -> None:
        """`starts` has the first row of each block; a window is about `buffer_size` rows, in whole
        blocks."""
        assert rows, "no rows to order"
        self._rows, self._seed, self.epoch = rows, seed, 0
        ends = [*(start for start in sorted(set(starts)) if 0 < start < rows), rows]
        self._blocks = [range(*bounds) for bounds in pairwise([0, *ends])]
        self._blocks_together = max(1, buffer_size * len(self._blocks) // rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        blocks = torch.randperm(len(self._blocks), generator=generator).tolist()
        for first in range(0, len(blocks), self._blocks_together):
            window = blocks[first : first + self._blocks_together]
            rows = list(chain.from_iterable(self._blocks[block] for block in window))
            order = torch.randperm(len(rows), generator=generator).tolist()
            yield from (rows[position] for position in order)
