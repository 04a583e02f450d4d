"""How long rows are in tokens, images included: what `max_length` and a batch have to hold."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from job.prep.statistics import bucket, histogram

LENGTHS = "lengths.json"


def lengths(measured: Counter[int], max_length: int) -> dict[str, Any]:
    """Figures of rows by their tokens before any is cut; `measured` counts rows by length."""
    rows, tokens = measured.total(), sum(length * count for length, count in measured.items())
    over = sum(count for length, count in measured.items() if length > max_length)
    buckets: Counter[int] = Counter()
    for length, count in measured.items():
        buckets[bucket(length)] += count
    return {
        "rows": rows,
        "tokens": tokens,
        "tokens_a_row": {
            "mean": round(tokens / rows, 1),
            **dict(_quantiles(measured, {"median": 0.5, "p95": 0.95, "max": 1.0})),
            "histogram": histogram(buckets),
        },
        "over_max_length": {
            "max_length": max_length,
            "rows": over,
            "share": round(over / rows, 6),
        },
    }


def _quantiles(measured: Counter[int], wanted: dict[str, float]) -> Iterator[tuple[str, int]]:
    """The shortest length that holds a share of the rows, for each name in rising order."""
    passed, ordered = 0, iter(sorted(measured))
    length = 0
    for name, share in wanted.items():
        while passed < share * measured.total():
            length = next(ordered)
            passed += measured[length]
        yield name, length
