"""Statistics of row lengths in tokens, images included, before truncation."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from job.prep.statistics import bucket, histogram

LENGTHS = "lengths.json"


def lengths(token_counts: Counter[int], max_length: int) -> dict[str, Any]:
    """The content of `lengths.json`; `token_counts` counts rows by length."""
    rows, tokens = (
        token_counts.total(),
        sum(length * count for length, count in token_counts.items()),
    )
    over = sum(count for length, count in token_counts.items() if length > max_length)
    buckets: Counter[int] = Counter()
    for length, count in token_counts.items():
        buckets[bucket(length)] += count
    return {
        "rows": rows,
        "tokens": tokens,
        "tokens_a_row": {
            "mean": round(tokens / rows, 1),
            **dict(_quantiles(token_counts, {"median": 0.5, "p95": 0.95, "max": 1.0})),
            "histogram": histogram(buckets),
        },
        "over_max_length": {
            "max_length": max_length,
            "rows": over,
            "share": round(over / rows, 6),
        },
    }


def _quantiles(token_counts: Counter[int], shares: dict[str, float]) -> Iterator[tuple[str, int]]:
    """The shortest length that covers each share of the rows; shares in rising order."""
    passed, ordered = 0, iter(sorted(token_counts))
    length = 0
    for name, share in shares.items():
        while passed < share * token_counts.total():
            length = next(ordered)
            passed += token_counts[length]
        yield name, length
