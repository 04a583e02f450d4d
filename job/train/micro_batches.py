"""How the rows of an optimizer step are divided among its forward passes.

A cut changes nothing in which rows a step has. Of none has a pass more tokens, or more rows times
the longest of them, than the `width` longest rows of the step, nor more patches of pictures than
the `width` rows of most patches.
"""

from collections.abc import Callable, Sequence

Pieces = list[list[int]]
Cut = Callable[[Sequence[int], int, int], Pieces]
"""From the row numbers of a step, its passes and the processes: the pieces of the first pass, one
for each process, then those of the next. There is a piece for each `width` rows, and some may be
empty.
"""


def in_order(width: int) -> Cut:
    """`width` rows a piece, as they come."""

    def cut(rows: Sequence[int], passes: int, processes: int) -> Pieces:
        return [list(rows[i * width : (i + 1) * width]) for i in range(passes * processes)]

    return cut


def alike(width: int, lengths: Sequence[int]) -> Cut:
    """`width` rows a piece, by falling length: for passes that pad rows to their longest one."""
    cut_in_order = in_order(width)

    def cut(rows: Sequence[int], passes: int, processes: int) -> Pieces:
        longest_first = sorted(rows, key=lengths.__getitem__, reverse=True)
        return _there_and_back(cut_in_order(longest_first, passes, processes), processes)

    return cut


def balanced(width: int, lengths: Sequence[int], patches: Sequence[int]) -> Cut:
    """About equally many tokens a piece, however many rows: for passes without padding.

    The longest row that is left goes to the piece with the fewest tokens. Attention may lay the
    rows of a pass in a grid as wide as the longest, so a piece takes no row that would make its
    grid larger than `width` times the longest row of the step, nor its patches more than those of
    the step's `width` rows of most patches. One of fewer than `width` rows always has room.
    """

    def cut(rows: Sequence[int], passes: int, processes: int) -> Pieces:
        longest_first = sorted(rows, key=lengths.__getitem__, reverse=True)
        room = width * lengths[longest_first[0]]
        pieces: Pieces = [[] for _ in range(passes * processes)]
        tokens, pictured = [0] * len(pieces), [0] * len(pieces)
        most = sum(sorted(map(patches.__getitem__, rows))[-width:])
        for row in longest_first:
            with_room = (
                n
                for n, piece in enumerate(pieces)
                if (len(piece) + 1) * lengths[(piece or [row])[0]] <= room
                and pictured[n] + patches[row] <= most
            )
            fewest = min(with_room, key=tokens.__getitem__)
            pieces[fewest].append(row)
            tokens[fewest] += lengths[row]
            pictured[fewest] += patches[row]
        order = sorted(range(len(pieces)), key=tokens.__getitem__, reverse=True)
        return _there_and_back([pieces[n] for n in order], processes)

    return cut


def _there_and_back(pieces: Pieces, processes: int) -> Pieces:
    """Falling pieces, so that no process has the largest of every pass."""
    passes = [pieces[start : start + processes] for start in range(0, len(pieces), processes)]
    return [piece for n, every in enumerate(passes) for piece in (every[::-1] if n % 2 else every)]
