"""Buckets: the few shapes that the micro-batches of a training are padded to.

A captured step replays one shape. More buckets mean less padding, but each costs a capture, so
their number follows from the batches that the training will have.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from job.families.packed_shape import PackedShape, largest

MAX_BUCKETS = 8
GROUPS = 64
"""Batches of similar size are kept together, so that the search does not grow with their number."""
CAPTURE_TOKENS = 12_000
"""A capture takes about as long as captured steps need for this many tokens: 0.9 s, at the 80 µs by
which a token more lengthens a step (benchmarks/results/train-stage-28b-cuda.json)."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    shapes: tuple[PackedShape, ...]
    """By descending number of tokens."""
    padding: float
    """The share of padding in all tokens of the batches, 0 to 1."""

    def of(self, shape: PackedShape) -> int | None:
        """The number of the smallest bucket that the batch can be padded to; None without one."""
        fitting = (n for n, bucket in enumerate(self.shapes) if shape.fits(bucket))
        return max(fitting, default=None)


def choose_buckets(
    batches: Iterable[PackedShape], cover: Callable[[Sequence[PackedShape]], PackedShape]
) -> Buckets:
    """The buckets that minimize the tokens computed for all batches, captures included.

    `cover` is the family's `bucket`. Batches are sorted by their tokens, and each bucket covers a
    range of them; the best division is found by dynamic programming.
    """
    ordered = sorted(batches, key=lambda shape: (shape.tokens, shape.patches))
    bounds = sorted({len(ordered) * n // GROUPS for n in range(GROUPS + 1)})
    groups = [ordered[start:end] for start, end in pairwise(bounds)]
    costs = _costs(groups, cover)
    # best[n][end]: the cost of the groups before `end` in n buckets, and where the last one starts.
    best = [[(0.0, 0)] + [(math.inf, 0)] * len(groups)]
    for _ in range(min(MAX_BUCKETS, len(groups))):
        fewer = best[-1]
        best.append([(math.inf, 0)])
        for end in range(1, len(groups) + 1):
            options = ((fewer[start][0] + costs[start][end], start) for start in range(end))
            best[-1].append(min(options))
    count = min(range(1, len(best)), key=lambda n: best[n][-1][0])
    computed = best[count][-1][0] - count * CAPTURE_TOKENS
    shapes, end = [], len(groups)
    for number in range(count, 0, -1):
        start = best[number][end][1]
        shapes.append(cover([shape for group in groups[start:end] for shape in group]))
        end = start
    padding = 1 - sum(shape.tokens for shape in ordered) / computed
    return Buckets(shapes=tuple(shapes), padding=padding)


def _costs(
    groups: Sequence[Sequence[PackedShape]],
    cover: Callable[[Sequence[PackedShape]], PackedShape],
) -> list[dict[int, float]]:
    """By first group, then by the group after the last: the tokens computed if one bucket covers
    their batches, its capture included."""
    # The extremes of a range have the same bucket as all of its batches.
    extremes = [
        [
            largest(group),
            min(group, key=lambda shape: shape.tokens),
            min(group, key=lambda shape: shape.patches),
        ]
        for group in groups
    ]
    costs: list[dict[int, float]] = []
    for start in range(len(groups)):
        covered: list[PackedShape] = []
        count = 0
        costs.append({})
        for end in range(start + 1, len(groups) + 1):
            covered += extremes[end - 1]
            count += len(groups[end - 1])
            costs[-1][end] = CAPTURE_TOKENS + count * cover(covered).tokens
    return costs
