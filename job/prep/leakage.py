"""Keeps the splits apart, by the rows' images and by their questions and answers.

A row leaks if it duplicates one of a split that is judged later: a training row one to validate or
evaluate on, a validation row one to evaluate on. Rows to evaluate on always stay.
"""

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from job.prep.rows import Row
from job.prep.shards import ShardWriter, Split, batches, shard_paths

if TYPE_CHECKING:
    import numpy as np

NormalizeLabel = Callable[[str], str]
"""Normalizes a label, so that labels with the same meaning are equal."""

LeakageBy = Literal["image_and_answer", "image"]
"""What makes two rows duplicates."""


class RowKeys:
    """The keys by which a row is compared with those of other splits; each computed once."""

    def __init__(self, row: Row, normalize_label: NormalizeLabel, by: LeakageBy) -> None:
        self._row, self._normalize_label, self._by = row, normalize_label, by

    @property
    def train_keys(self) -> list[int]:
        """The digests of a training row, which leaks if it shares one with a held-out row.

        One per image, and one of question and answer together, since many answers are just `yes`.
        """
        if self._images and self._by == "image":
            return self._images
        return self.eval_keys

    @property
    def eval_keys(self) -> list[int]:
        """The digests of a held-out row: all kinds, since training sources may differ in theirs.

        If it has images, the last one is that of question and answer.
        """
        if not self._images:
            return [_digest(b"text", _text(self._row))]
        return [*self._images, _digest(b"label", _encode(self._label))]

    @property
    def split_group(self) -> str:
        """Equal for rows that must be in the same split."""
        if self._images and self._by == "image":
            return "\0".join(f"{image:x}" for image in self._images)
        return self._label

    @cached_property
    def _images(self) -> list[int]:
        return [_digest(b"image", image.data) for image in self._row.images]

    @cached_property
    def _label(self) -> str:
        prompt = [message.text for message in self._row.prompt]
        return "\0".join([*prompt, self._normalize_label(self._row.answer)])


@dataclass(frozen=True, kw_only=True)
class LeakedRows:
    """Rows of each split that duplicate a row of a split that is judged later."""

    train: int = 0
    validation: int = 0


def drop_leaked(
    directory: Path, *, remove: bool = True, validation_by: Mapping[Path, LeakageBy] | None = None
) -> LeakedRows:
    """Removes leaked rows; returns their numbers.

    `remove=False` only counts. `validation_by` has what makes duplicates of the rows of each
    validation shard. Reads only digests, keeps those of held-out rows in memory, and rewrites only
    shards with leaked rows.
    """
    import numpy as np

    held_out = np.unique(read_digests(directory, ["eval"], "keys"))
    validation = 0
    for shard, by in (validation_by or {}).items():
        validation += _drop(shard, held_out, remove=remove, images_only=by == "image")
    if validation_by:
        own = np.unique(read_digests(directory, ["validation"], "keys"))
        held_out = np.union1d(held_out, own)
    train = 0
    for shard in shard_paths(directory, "train"):
        train += _drop(shard, held_out, remove=remove)
    return LeakedRows(train=train, validation=validation)


def _drop(shard: Path, held_out: "np.ndarray", *, remove: bool, images_only: bool = False) -> int:
    """Removes the shard's rows that share a key with `held_out`, (N,); returns their number.

    `images_only` ignores the key of question and answer of rows with images.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute

    masks = []
    for batch in batches(shard, ["keys", "looks"]):
        keys, hashes = batch.column(0), batch.column(1)
        hit = np.isin(keys.flatten().to_numpy(zero_copy_only=False), held_out)
        if images_only:
            last = np.cumsum(pa.compute.list_value_length(keys).to_numpy(zero_copy_only=False)) - 1
            images = pa.compute.list_value_length(hashes).to_numpy(zero_copy_only=False)
            hit[last[images > 0]] = False
        rows = pa.compute.list_parent_indices(keys).to_numpy(zero_copy_only=False)
        mask = np.zeros(len(batch), dtype=bool)
        mask[rows[hit]] = True
        masks.append(mask)
    leaked = sum(int(mask.sum()) for mask in masks)
    if leaked and remove:
        writer = ShardWriter(shard)
        for batch, mask in zip(batches(shard), masks, strict=True):
            writer.copy(batch.filter(pa.array(~mask)))
        writer.close()
    return leaked


def read_digests(directory: Path, splits: Sequence[Split], column: str) -> "np.ndarray":
    """One digest column of whole splits, flat, (N,) of eight bytes each."""
    import numpy as np
    import pyarrow as pa

    digests = array("Q")
    for shard in (shard for split in splits for shard in shard_paths(directory, split)):
        for batch in batches(shard, [column]):
            values = batch.column(0)
            flat = values.flatten() if pa.types.is_list(values.type) else values
            digests.frombytes(flat.to_numpy(zero_copy_only=False).tobytes())
    return np.frombuffer(digests, dtype=np.uint64)


def row_digest(row: Row) -> int:
    """A digest of a row's images and text, without its id."""
    return _digest(b"row", b"\0".join([*(image.data for image in row.images), _text(row)]))


def _text(row: Row) -> bytes:
    return _encode("\0".join(message.text for message in row.messages))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(kind: bytes, data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, key=kind, digest_size=8).digest(), "big")
