"""A tokenized row, and the sizes that determine its memory in a training step."""

from dataclasses import dataclass

from job.prep.rows import EncodedImage

IGNORED = -100
"""The label of a token that is not supervised; `ignore_index` of the cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A tokenized row; its images are still encoded files."""

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """Same length as `input_ids`; `IGNORED` for tokens that are not supervised."""
    images: tuple[EncodedImage, ...]

    @property
    def supervised_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, kw_only=True)
class RowSize:
    """The sizes that determine a row's memory in a training step."""

    tokens: int
    image_tokens: int
    """Tokens that belong to images, including start and end tokens."""
    supervised_tokens: int
    """Supervised tokens."""
    patches: tuple[int, ...]
    """Patches of each image, before merging."""
