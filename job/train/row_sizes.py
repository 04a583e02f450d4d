"""The sizes of all training rows, compactly: there may be millions."""

from array import array
from collections.abc import Sequence

from job.families.encoded import RowSize
from job.families.packed_shape import PackedShape


class RowSizes:
    """Columns of the rows' sizes, by row number."""

    def __init__(self) -> None:
        self._tokens, self._vision, self._supervised = array("l"), array("l"), array("l")
        self._images, self._patches, self._largest = array("l"), array("l"), array("l")

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowSizes) and vars(self) == vars(other)

    def append(self, size: RowSize) -> None:
        self._tokens.append(size.tokens)
        self._vision.append(size.image_tokens)
        self._supervised.append(size.supervised_tokens)
        self._images.append(len(size.patches))
        self._patches.append(sum(size.patches))
        self._largest.append(max(size.patches, default=0))

    def shape(self, rows: Sequence[int]) -> PackedShape:
        """The shape of a packed batch of these rows."""
        tokens = [self._tokens[row] for row in rows]
        vision = sum(self._vision[row] for row in rows)
        return PackedShape(
            rows=len(rows),
            text=sum(tokens) - vision,
            vision=vision,
            supervised=sum(self._supervised[row] for row in rows),
            longest=max(tokens),
            images=sum(self._images[row] for row in rows),
            patches=sum(self._patches[row] for row in rows),
            largest_image=max(self._largest[row] for row in rows),
        )
