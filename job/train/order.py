"""The order of rows: one for the whole job, however many processes share it.

A pass over the rows is one shuffled list. Each optimizer step takes the next piece of it and
divides it among its forward passes, over all processes, so that the rows of a step are the same
whether they are taken by one process or by several, at once or one after another.
"""

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler

from job.train.passes import Cut, in_order

SPARE = -1
"""Stands for a row that is computed and not counted: a process without rows must keep step."""


class SharedBatches:
    """A batch sampler: the batches, as lists of row numbers, of one of `processes`.

    Every process has equally many. Where the rows of the last step do not reach all of them, the
    others have `[SPARE]`.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        seed: int,
        passes: int = 1,
        process: int = 0,
        processes: int = 1,
        cut: Cut | None = None,
    ) -> None:
        """A step has `passes` batches of each process; `cut` divides its rows, by default in order.

        A batch has `batch_size` rows, unless the cut gives it more or fewer.
        """
        self.batch_size = batch_size
        # Trainer's loader sets the epoch of what it finds under this name.
        self.sampler = SeedableRandomSampler(range(rows), data_seed=seed)
        self._rows, self._passes = rows, passes
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
