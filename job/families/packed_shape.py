"""The shape of a packed batch, and shapes that several batches are padded to.

A captured step replays fixed shapes, so batches are padded to one of a few of them ("buckets").
"""

from collections.abc import Iterable
from operator import le
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from job.families.encoded import RowSize


class PackedShape(NamedTuple):
    """The sizes that determine the shapes of all tensors of a packed batch."""

    rows: int
    text: int
    """Tokens that do not belong to images."""
    vision: int
    """Tokens that belong to images, including start and end tokens."""
    supervised: int
    longest: int
    """Tokens of the longest row."""
    images: int
    patches: int
    """Image patches, before merging."""
    largest_image: int
    """Patches of the largest image."""

    @property
    def tokens(self) -> int:
        return self.text + self.vision

    @classmethod
    def of(cls, rows: "Iterable[RowSize]") -> "PackedShape":
        """The shape of a batch of these rows."""
        rows = list(rows)
        patches = [count for row in rows for count in row.patches]
        return cls(
            rows=len(rows),
            text=sum(row.tokens - row.image_tokens for row in rows),
            vision=sum(row.image_tokens for row in rows),
            supervised=sum(row.supervised_tokens for row in rows),
            longest=max(row.tokens for row in rows),
            images=len(patches),
            patches=sum(patches),
            largest_image=max(patches, default=0),
        )

    def fits(self, bucket: "PackedShape") -> bool:
        """Whether a batch of this shape can be padded to a bucket.

        The padding is more rows, with text, and more images, and none of them may be too long.
        """
        rows, images = bucket.rows - self.rows, bucket.images - self.images
        return (
            all(map(le, self, bucket))
            and self.text < bucket.text
            and bucket.tokens - self.tokens <= rows * bucket.longest
            and bucket.patches - self.patches <= images * bucket.largest_image
        )


def largest(shapes: Iterable[PackedShape]) -> PackedShape:
    """The largest value of every size."""
    return PackedShape(*map(max, zip(*shapes, strict=True)))
