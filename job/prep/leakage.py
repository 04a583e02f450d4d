"""Keeps held-out rows out of training: by images, and by what is asked and answered."""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from job.prep.rows import Row
from job.prep.shards import ShardWriter, Split, batches, shards

if TYPE_CHECKING:
    import numpy as np

LabelKey = Callable[[str], str]
"""The normal form of a label: labels that mean the same have the same."""

By = Literal["image_and_answer", "image"]
"""What makes two rows the same."""


class Compared:
    """A row by what makes it the same as another, so that one must not train for the other's sake.

    What it is compared by is worked out once, and where it is asked for.
    """

    def __init__(self, row: Row, label_key: LabelKey, by: By) -> None:
        self._row, self._label_key, self._by = row, label_key, by

    @property
    def keys(self) -> list[int]:
        """Digests, one of which is enough: of each picture, and of what is asked and answered.

        An answer counts with its question: `yes` answers many.
        """
        if not self._pictures:
            return [_digest(b"text", _said(self._row))]
        if self._by == "image":
            return self._pictures
        return self.every_key

    @property
    def every_key(self) -> list[int]:
        """The keys of a held-out row: those of whatever source may be compared by them."""
        if not self._pictures:
            return [_digest(b"text", _said(self._row))]
        return [*self._pictures, _digest(b"label", _bytes(self._label))]

    @property
    def group(self) -> str:
        """What rows have in common that must fall on one side of a split."""
        if self._pictures and self._by == "image":
            return "\0".join(f"{picture:x}" for picture in self._pictures)
        return self._label

    @cached_property
    def _pictures(self) -> list[int]:
        return [_digest(b"image", image.data) for image in self._row.images]

    @cached_property
    def _label(self) -> str:
        asked = [message.text for message in self._row.messages[:-1]]
        return "\0".join([*asked, self._label_key(self._row.answer)])


def drop_leaked(directory: Path, *, remove: bool = True) -> int:
    """Removes from the training shards every row that shows or says what a held-out row does.

    Gives how many there are; `remove=False` only counts. Only digests are read, and in memory are
    those of the held-out rows; a shard without such a row stays as it is.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute

    held_out = np.unique(digests(directory, ["eval"], "keys"))
    leaked = 0
    for shard in shards(directory, "train"):
        masks = []
        for batch in batches(shard, ["keys"]):
            keys = batch.column(0)
            hit = np.isin(keys.flatten().to_numpy(zero_copy_only=False), held_out)
            rows = pa.compute.list_parent_indices(keys).to_numpy(zero_copy_only=False)
            mask = np.zeros(len(batch), dtype=bool)
            mask[rows[hit]] = True
            masks.append(mask)
        found = sum(int(mask.sum()) for mask in masks)
        leaked += found
        if found and remove:
            writer = ShardWriter(shard)
            for batch, mask in zip(batches(shard), masks, strict=True):
                writer.copy(batch.filter(pa.array(~mask)))
            writer.close()
    return leaked


def digests(directory: Path, splits: Sequence[Split], column: str) -> "np.ndarray":
    """One column of digests of whole splits, flat: eight bytes each, which is all that it takes."""
    import numpy as np
    import pyarrow as pa

    found = array("Q")
    for shard in (shard for split in splits for shard in shards(directory, split)):
        for batch in batches(shard, [column]):
            values = batch.column(0)
            flat = values.flatten() if pa.types.is_list(values.type) else values
            found.frombytes(flat.to_numpy(zero_copy_only=False).tobytes())
    return np.frombuffer(found, dtype=np.uint64)


def whole_of(row: Row) -> int:
    """A digest of all that a row shows and says, and not of its id."""
    return _digest(b"row", b"\0".join([*(image.data for image in row.images), _said(row)]))


def _said(row: Row) -> bytes:
    return _bytes("\0".join(message.text for message in row.messages))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(kind: bytes, data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, key=kind, digest_size=8).digest(), "big")
