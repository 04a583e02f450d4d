"""The order of rows: one for the whole job, however many processes share it.

A pass over the rows is one shuffled list. Each forward pass of all processes takes the next piece
of it, and each process its part of the piece, so that the rows of an optimizer step are the same
whether they are taken by one process or by several, at once or one after another.
"""

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler

SPARE = -1
"""Stands for a row that is computed and not counted: a process without rows must keep step."""


class SharedBatches:
    """A batch sampler: the batches, as lists of row numbers, of one of `processes`.

    Every process has equally many. Where the rows of the last piece do not reach all of them, the
    others have `[SPARE]`.
    """

    def __init__(
        self, rows: int, batch_size: int, *, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        self.batch_size = batch_size
        # Trainer's loader sets the epoch of what it finds under this name.
        self.sampler = SeedableRandomSampler(range(rows), data_seed=seed)
        self._rows, self._process, self._processes = rows, process, processes

    def __len__(self) -> int:
        return -(-self._rows // (self.batch_size * self._processes))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        width = self.batch_size
        for start in range(0, len(order), width * self._processes):
            first = start + width * self._process
            yield order[first : first + width] or [SPARE]
