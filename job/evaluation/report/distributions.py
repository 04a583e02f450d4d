"""How the training rows spread: tokens a row, characters of an answer, pixels of a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One range of a histogram; the bar's length is `share`, the longest being 1."""

    name: str
    count: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    title: str
    words: str
    bars: tuple[Bar, ...]


def histograms(
    statistics: Mapping[str, Any] | None, lengths: Mapping[str, Any] | None
) -> tuple[Histogram, ...]:
    """Those that `data/stats.json` and `train/lengths.json` have figures for."""
    found = []
    if lengths:
        over = lengths["over_max_length"]
        words = (
            f"{over['rows']:,} of {lengths['rows']:,} rows ({over['share']:.2%}) are longer than "
            f"train.max_length, {over['max_length']:,}"
        )
        found.append(_histogram("Tokens a row, pictures included", lengths["tokens_a_row"], words))
    train = (statistics or {}).get("train", {})
    for key, title in (
        ("answer_characters", "Characters of an answer"),
        ("image_pixels", "Pixels of a picture"),
    ):
        if train.get(key, {}).get("histogram"):
            found.append(_histogram(title, train[key]))
    return tuple(found)


def _histogram(title: str, figures: Mapping[str, Any], more: str = "") -> Histogram:
    counts = {int(name.split("-")[0]): count for name, count in figures["histogram"].items()}
    most, low, ranges = max(counts.values()), min(counts), []
    while low <= max(counts):  # a range without rows is a gap to see
        ranges.append(low)
        low *= 2
    middle = f"median {figures['median']:,}, " if "median" in figures else ""
    mean = f"{figures['mean']:,.1f}".removesuffix(".0")
    words = f"mean {mean}, {middle}largest {figures['max']:,}"
    return Histogram(
        title=title,
        words=f"{words}; {more}" if more else words,
        bars=tuple(
            Bar(name=_range(low), count=counts.get(low, 0), share=counts.get(low, 0) / most)
            for low in ranges
        ),
    )


def _range(low: int) -> str:
    return "1" if low == 1 else f"{low:,} – {2 * low - 1:,}"
