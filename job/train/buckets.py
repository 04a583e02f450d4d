"""Buckets: the few shapes that the micro-batches of a training are padded to.

A captured step replays one shape. More buckets mean less padding, but each costs a capture, so
their number follows from the batches that the training will have.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from job.families.packed_shape import PackedShape, largest

MAX_BUCKETS = 16
CELLS = 64
"""Batches of similar size are kept together, so that the search does not grow with their number."""
CAPTURE_TOKENS = 12_000
"""A capture takes about as long as captured steps need for this many tokens: 0.9 s, at the 80 µs by
which a token more lengthens a step (benchmarks/results/train-stage-28b-cuda.json)."""

Cover = Callable[[Sequence[PackedShape]], PackedShape]
"""A family's `bucket`: the smallest shape that batches of these can be padded to."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    shapes: tuple[PackedShape, ...]
    """By descending number of tokens."""
    padding: float = 0.0
    """The share of padding in all tokens of the batches, 0 to 1."""

    def of(self, shape: PackedShape) -> int | None:
        """The number of the smallest bucket that the batch can be padded to; None without one."""
        smallest_first = reversed(range(len(self.shapes)))
        return next((n for n in smallest_first if shape.fits(self.shapes[n])), None)


def choose_buckets(batches: Iterable[PackedShape], cover: Cover) -> Buckets:
    """Buckets with few tokens to compute for all batches, captures included.

    Text and images vary independently, so batches are divided by the tokens of both, into cells.
    Cells are merged, always the two whose merging costs the least, until every merge left would
    cost more than the capture that it saves.
    """
    every = list(batches)
    groups = _merged([_Group.of(cell, len(cell), cover) for cell in _cells(every)], cover)
    shapes = sorted((group.bucket for group in groups), key=lambda shape: -shape.tokens)
    buckets = Buckets(shapes=tuple(shapes))
    computed = sum(shapes[buckets.of(batch) or 0].tokens for batch in every)
    padding = 1 - sum(batch.tokens for batch in every) / computed
    return replace(buckets, padding=padding)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Group:
    """Batches that are padded to one bucket."""

    extremes: tuple[PackedShape, ...]
    """Shapes that have the same bucket as all of the batches."""
    count: int
    bucket: PackedShape

    @classmethod
    def of(cls, shapes: Sequence[PackedShape], count: int, cover: Cover) -> "_Group":
        """The group of `count` batches; `shapes` are theirs, or extremes of them."""
        extremes = (
            largest(shapes),
            min(shapes, key=lambda shape: shape.tokens),
            min(shapes, key=lambda shape: shape.patches),
        )
        return cls(extremes=extremes, count=count, bucket=cover(extremes))

    @property
    def cost(self) -> int:
        """The tokens that are computed for its batches, the capture included."""
        return CAPTURE_TOKENS + self.count * self.bucket.tokens


Axis = Callable[[PackedShape], int]
AXES: tuple[Axis, Axis] = (lambda shape: shape.text, lambda shape: shape.vision)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Cell:
    """Batches of similar size."""

    batches: list[PackedShape]
    axis: Axis
    """Text or image tokens, whichever differ more among the batches."""
    spread: int
    """By how much: the tokens of the largest, less those of the smallest."""

    @classmethod
    def of(cls, batches: list[PackedShape]) -> "_Cell":
        spreads = [_spread(batches, axis) for axis in AXES]
        widest = max(range(len(AXES)), key=spreads.__getitem__)
        return cls(batches=batches, axis=AXES[widest], spread=spreads[widest])

    def halves(self) -> "list[_Cell]":
        ordered = sorted(self.batches, key=self.axis)
        middle = len(ordered) // 2
        return [_Cell.of(ordered[:middle]), _Cell.of(ordered[middle:])]


def _cells(batches: list[PackedShape]) -> list[list[PackedShape]]:
    """Divides the batches, always the cell in which all together are the farthest apart."""
    cells = [_Cell.of(batches)]
    while len(cells) < CELLS:
        widest = max(cells, key=lambda cell: cell.spread * len(cell.batches))
        if not widest.spread:
            break
        cells.remove(widest)
        cells += widest.halves()
    return [cell.batches for cell in cells]


def _spread(batches: Sequence[PackedShape], axis: Axis) -> int:
    sizes = [axis(shape) for shape in batches]
    return max(sizes) - min(sizes)


def _merged(groups: Sequence[_Group], cover: Cover) -> list[_Group]:
    """The groups that are left once no merge saves anything, at most `MAX_BUCKETS`."""

    def merge(first: _Group, second: _Group) -> _Group:
        extremes = (*first.extremes, *second.extremes)
        return _Group.of(extremes, first.count + second.count, cover)

    left = list(groups)
    merges = {pair: merge(*pair) for pair in combinations(left, 2)}

    def added(pair: tuple[_Group, _Group]) -> int:
        return merges[pair].cost - pair[0].cost - pair[1].cost

    while merges:
        best = min(merges, key=added)
        if added(best) >= 0 and len(left) <= MAX_BUCKETS:
            break
        new = merges[best]
        left = [group for group in left if group not in best]
        merges = {pair: both for pair, both in merges.items() if not {*pair} & {*best}}
        merges |= {(new, other): merge(new, other) for other in left}
        left.append(new)
    return left
