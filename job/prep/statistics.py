"""Statistics of a split, added up shard by shard without its rows in memory."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from job.prep.rows import Row

_SUMS = (
    *("rows", "given_system", "trained_answers", "with_thoughts"),
    *("images", "without_image", "characters", "pixels"),
)


@dataclass(kw_only=True)
class Statistics:
    """Running sums; histograms count by powers of two, keyed by the lower bound.

    The field names are the keys in chunk notes.
    """

    rows: int = 0
    given_system: int = 0
    """Rows whose system prompt is the spec's, because they have none of their own."""
    trained_answers: int = 0
    with_thoughts: int = 0
    """Trained answers that have thoughts."""
    images: int = 0
    without_image: int = 0
    """Rows."""
    fewest: int | None = None
    """Images of a row; None if there are no rows."""
    most: int = 0
    """Images of a row."""
    characters: int = 0
    """Of answers."""
    longest: int = 0
    """Characters of an answer."""
    pixels: int = 0
    largest: int = 0
    """Pixels of an image."""
    by_characters: Counter[int] = field(default_factory=Counter)
    by_pixels: Counter[int] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        length = len(row.answer)
        self.rows += 1
        self.given_system += row.given_system
        trained = [each for each in row.messages if each.role == "assistant" and each.train]
        self.trained_answers += len(trained)
        self.with_thoughts += sum(each.reasoning is not None for each in trained)
        images = len(row.images)
        self.images += images
        self.without_image += not images
        self.fewest = images if self.fewest is None else min(self.fewest, images)
        self.most = max(self.most, images)
        self.characters += length
        self.longest = max(self.longest, length)
        self.by_characters[bucket(length)] += 1
        for image in row.images:
            area = image.width * image.height
            self.pixels += area
            self.largest = max(self.largest, area)
            self.by_pixels[bucket(area)] += 1

    def merge(self, other: "Statistics") -> None:
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        fewest = [each.fewest for each in (self, other) if each.fewest is not None]
        self.fewest = min(fewest, default=None)
        self.most = max(self.most, other.most)
        self.longest = max(self.longest, other.longest)
        self.largest = max(self.largest, other.largest)
        self.by_characters += other.by_characters
        self.by_pixels += other.by_pixels

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Statistics":
        counters = {
            name: Counter({int(bound): count for bound, count in value[name].items()})
            for name in ("by_characters", "by_pixels")
        }
        return cls(**{**value, **counters})

    def summary(self) -> dict[str, Any]:
        """The split's section of `stats.json`."""
        return {
            "rows": self.rows,
            "rows_given_system": self.given_system,
            "trained_answers": self.trained_answers,
            "trained_answers_with_thoughts": self.with_thoughts,
            "images": self.images,
            "images_per_row": {
                "min": self.fewest or 0,
                "mean": round(self.images / max(1, self.rows), 2),
                "max": self.most,
            },
            "rows_without_image": self.without_image,
            "answer_characters": {
                "mean": round(self.characters / max(1, self.rows), 1),
                "max": self.longest,
                "histogram": histogram(self.by_characters),
            },
            "image_pixels": {
                "mean": round(self.pixels / max(1, self.images), 1),
                "max": self.largest,
                "histogram": histogram(self.by_pixels),
            },
        }


def bucket(value: int) -> int:
    """The histogram bucket of `value`: the largest power of two not above it, at least 1."""
    return 1 << max(0, value.bit_length() - 1)


def histogram(counts: Counter[int]) -> dict[str, int]:
    """`{"64-127": 12}`, in order."""
    return {f"{low}-{2 * low - 1}": counts[low] for low in sorted(counts)}
