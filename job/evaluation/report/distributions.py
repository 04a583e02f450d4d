"""Histograms of the training rows: tokens per row, characters per answer, pixels per image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bin of a histogram; `share` is the bar's length relative to the longest."""

    name: str
    count: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    title: str
    description: str
    bars: tuple[Bar, ...]


def histograms(
    statistics: Mapping[str, Any] | None, lengths: Mapping[str, Any] | None
) -> tuple[Histogram, ...]:
    """The histograms in `data/stats.json` and `train/lengths.json`."""
    result = []
    if lengths:
        over = lengths["over_max_length"]
        description = (
            f"{over['rows']:,} of {lengths['rows']:,} rows ({over['share']:.2%}) exceed "
            f"train.max_length ({over['max_length']:,})"
        )
        result.append(
            _histogram("Tokens per row, including images", lengths["tokens_a_row"], description)
        )
    train = (statistics or {}).get("train", {})
    for key, title in (
        ("answer_characters", "Characters per answer"),
        ("image_pixels", "Pixels per image"),
    ):
        if train.get(key, {}).get("histogram"):
            result.append(_histogram(title, train[key]))
    return tuple(result)


def _histogram(title: str, figures: Mapping[str, Any], more: str = "") -> Histogram:
    counts = {int(name.split("-")[0]): count for name, count in figures["histogram"].items()}
    most, low, ranges = max(counts.values()), min(counts), []
    while low <= max(counts):  # empty bins show as gaps
        ranges.append(low)
        low *= 2
    median = f"median {figures['median']:,}, " if "median" in figures else ""
    mean = f"{figures['mean']:,.1f}".removesuffix(".0")
    description = f"mean {mean}, {median}maximum {figures['max']:,}"
    return Histogram(
        title=title,
        description=f"{description}; {more}" if more else description,
        bars=tuple(
            Bar(name=_range(low), count=counts.get(low, 0), share=counts.get(low, 0) / most)
            for low in ranges
        ),
    )


def _range(low: int) -> str:
    return "1" if low == 1 else f"{low:,} – {2 * low - 1:,}"
