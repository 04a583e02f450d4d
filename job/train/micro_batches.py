"""Splits the rows of an optimizer step into micro-batches.

A split never changes which rows are in a step. It bounds the memory of every micro-batch: tokens
before and after padding by those of the step's `size` longest rows, and image patches by those of
the `size` rows with the most patches.
"""

from collections.abc import Callable, Sequence

MicroBatches = list[list[int]]
Split = Callable[[Sequence[int], int, int], MicroBatches]
"""Maps a step's row numbers, the number of micro-batches per process and the number of processes to
the micro-batches: the first of every process, then the second of every process, and so on. Some may
be empty.
"""


def in_order(size: int) -> Split:
    """`size` rows each, in order."""

    def split(rows: Sequence[int], micro_batches: int, processes: int) -> MicroBatches:
        return [list(rows[i * size : (i + 1) * size]) for i in range(micro_batches * processes)]

    return split


def sorted_by_length(size: int, lengths: Sequence[int]) -> Split:
    """`size` rows each, by descending length: for padded micro-batches."""
    split_in_order = in_order(size)

    def split(rows: Sequence[int], micro_batches: int, processes: int) -> MicroBatches:
        longest_first = sorted(rows, key=lengths.__getitem__, reverse=True)
        return _alternate(split_in_order(longest_first, micro_batches, processes), processes)

    return split


def balanced(size: int, lengths: Sequence[int], patches: Sequence[int]) -> Split:
    """About equally many tokens each, with any number of rows: for packed micro-batches.

    Greedy: the longest remaining row goes to the micro-batch with the fewest tokens. Attention may
    pad the rows of a micro-batch to a grid, so no row is added that would make the grid larger than
    `size` times the step's longest row, or the patches more than those of the `size` rows with the
    most patches. A micro-batch with fewer than `size` rows always has room.
    """

    def split(rows: Sequence[int], micro_batches: int, processes: int) -> MicroBatches:
        longest_first = sorted(rows, key=lengths.__getitem__, reverse=True)
        max_grid = size * lengths[longest_first[0]]
        max_patches = sum(sorted(map(patches.__getitem__, rows))[-size:])
        parts: MicroBatches = [[] for _ in range(micro_batches * processes)]
        tokens, part_patches = [0] * len(parts), [0] * len(parts)
        for row in longest_first:
            with_room = (
                n
                for n, part in enumerate(parts)
                if (len(part) + 1) * lengths[(part or [row])[0]] <= max_grid
                and part_patches[n] + patches[row] <= max_patches
            )
            fewest = min(with_room, key=tokens.__getitem__)
            parts[fewest].append(row)
            tokens[fewest] += lengths[row]
            part_patches[fewest] += patches[row]
        order = sorted(range(len(parts)), key=tokens.__getitem__, reverse=True)
        return _alternate([parts[n] for n in order], processes)

    return split


def _alternate(parts: MicroBatches, processes: int) -> MicroBatches:
    """Reverses every other round of descending parts, so no process gets all the largest ones."""
    rounds = [parts[start : start + processes] for start in range(0, len(parts), processes)]
    return [part for n, each in enumerate(rounds) for part in (each[::-1] if n % 2 else each)]
