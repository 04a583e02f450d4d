"""Rows as Trainer sees them: encoded when asked for, and cut or dropped to fit `max_length`."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from job import log
from job.errors import DataError, JobError, Problem
from job.families.base import IGNORED, Encoded, Family
from job.families.batches import COUNTED, FAILED, TOKENS
from job.prep.rows import Row
from job.redaction import redact
from job.spec.types import DataSpec, TrainSpec
from job.train.sampler import SPARE

_MEASURED_TOGETHER = 64
_WORTH_WORKERS = 10_000  # fewer rows are measured sooner than processes start
_SHOWN = 20  # rows that the model refuses
_REPEATED = re.compile(r"(<\|[^|]+\|>)\1+")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The rows that fit, by their numbers, and how many do not."""

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of each row kept, after truncation."""
    patches: tuple[int, ...]
    """What the pictures of each are cut into; where a family cannot tell, their tokens."""
    dropped: int
    measured: Counter[int]
    """How many rows there are of each length in tokens, before any is cut."""

    def starts(self, blocks: Sequence[int]) -> list[int]:
        """Where blocks of all rows, by their first rows, begin among the rows kept."""
        return [bisect_left(self.indices, first) for first in blocks]


def fit(rows: Sequence[Row], family: Family, data: DataSpec, train: TrainSpec) -> Fitted:
    """Which rows train, by their length in tokens; no image is decoded.

    Raises DataError if the family refuses rows, with all of them, or if no row is left.
    """
    from torch.utils.data import DataLoader

    indices, lengths, patches = [], [], []
    measured: Counter[int] = Counter()
    refused: list[Problem] = []
    every: Any = _Lengths(rows, family, lambda row: truncate(row, family, data, train))
    loader: Any = DataLoader(
        every,
        batch_size=_MEASURED_TOGETHER,
        num_workers=train.dataloader_num_workers if len(rows) >= _WORTH_WORKERS else 0,
        collate_fn=list,
    )
    with log.progress("measure rows", len(rows)) as bar:
        for number, found in enumerate(chain.from_iterable(loader)):
            bar.advance()
            if isinstance(found, DataError):
                refused += found.problems
                continue
            whole, length, pictured = found
            measured[whole] += 1
            if length:
                indices.append(number)
                lengths.append(length)
                patches.append(pictured)
    if refused:
        shown = refused[:_SHOWN]
        if more := len(refused) - len(shown):
            shown.append(Problem("…", f"and {more} more rows that the model refuses"))
        raise DataError.from_problems(shown)
    dropped = len(rows) - len(indices)
    if not indices:
        raise DataError(
            "$.train.max_length",
            f"all {len(rows)} training rows are longer",
            value=train.max_length,
            fix="raise max_length, or lower data.max_pixels",
        )
    return Fitted(
        indices=tuple(indices),
        lengths=tuple(lengths),
        patches=tuple(patches),
        dropped=dropped,
        measured=measured,
    )


class _Lengths:
    """Each row's tokens before and after truncation, and its pictures' patches: 0 after it where
    the row is dropped; the error where it is refused.

    A worker process can only hand an error back as a value: what it raises arrives as another.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        family: Family,
        cut: Callable[[Encoded], Encoded | None],
    ) -> None:
        self._rows, self._family, self._cut = rows, family, cut

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[int, int, int] | DataError:
        try:
            whole = self._family.encode(self._rows[index])
        except DataError as error:
            return error
        kept = self._cut(whole)
        if kept is None:
            return len(whole.input_ids), 0, 0
        size = self._family.row_size(kept)
        return len(whole.input_ids), size.tokens, sum(size.patches) or size.image_tokens


def truncate(encoded: Encoded, family: Family, data: DataSpec, train: TrainSpec) -> Encoded | None:
    """The row within `max_length`; None where it has to be dropped.

    Image tokens are never cut: an image with fewer tokens than pixels is another image.
    """
    excess = len(encoded.input_ids) - train.max_length
    if excess <= 0:
        return encoded
    if data.truncation_strategy == "delete":
        return None
    cuttable = [i for i, token in enumerate(encoded.input_ids) if not family.is_image_token(token)]
    if len(cuttable) < excess:
        return None
    cut = set(cuttable[:excess] if data.truncation_strategy == "left" else cuttable[-excess:])
    kept = [i for i in range(len(encoded.input_ids)) if i not in cut]
    labels = tuple(encoded.labels[i] for i in kept)
    if all(label == IGNORED for label in labels):
        return None
    return Encoded(
        id=encoded.id,
        input_ids=tuple(encoded.input_ids[i] for i in kept),
        labels=labels,
        images=encoded.images,
    )


class EncodedDataset:
    """A map-style dataset of encoded rows; each is tokenized when it is asked for."""

    def __init__(
        self,
        rows: Sequence[Row],
        fitted: Fitted,
        encode: Callable[[Row], Encoded | None],
    ) -> None:
        self._rows, self._fitted, self._encode = rows, fitted, encode

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return self._fitted.lengths

    @property
    def patches(self) -> tuple[int, ...]:
        """What the pictures of each row are cut into."""
        return self._fitted.patches

    def __len__(self) -> int:
        return len(self._fitted.indices)

    def __getitem__(self, index: int) -> "Encoded | Spare | JobError":
        """The row of that number; for `SPARE` the first one, not to be counted.

        An error is a value: what a worker process raises arrives as another.
        """
        try:
            return Spare(self.row(0)) if index == SPARE else self.row(index)
        except JobError as error:
            return error

    def row(self, index: int) -> Encoded:
        encoded = self._encode(self._rows[self._fitted.indices[index]])
        assert encoded is not None, "a row that fitted once fits again"
        return encoded


@dataclass(frozen=True)
class Spare:
    """A row that is computed and does not count."""

    row: Encoded


class Collator:
    """The family's collator, with the check that every batch trains something.

    Adds `counted_tokens`, for the loss, and `tokens`, for the speed. A batch that cannot be made is
    its error, under `FAILED`.
    """

    def __init__(self, family: Family, *, padding_free: bool) -> None:
        self._collate = family.pack if padding_free else family.collate

    def __call__(self, picked: "list[Encoded | Spare | JobError]") -> dict[str, Any]:
        found = []
        for each in picked:
            if isinstance(each, JobError):
                return {FAILED: each}
            found.append(each)
        try:
            return self.batch(found)
        except DataError as error:
            return {FAILED: error}

    def batch(self, picked: "Sequence[Encoded | Spare]") -> dict[str, Any]:
        """The batch of these rows. Raises DataError where none of them trains."""
        rows = [each.row if isinstance(each, Spare) else each for each in picked]
        own = [each for each in picked if isinstance(each, Encoded)]
        # The first token is foretold by nothing.
        counted = sum(label != IGNORED for row in own for label in row.labels[1:])
        if not any(row.trained_tokens for row in rows):
            raise DataError(
                ", ".join(row.id for row in rows),
                "a batch has no trained token",
                fix="these rows have no answer left within max_length; "
                "set data.truncation_strategy: delete",
            )
        tokens = sum(len(row.input_ids) for row in own)
        return {**self._collate(rows), COUNTED: counted, TOKENS: tokens}


def label_proof(encoded: Encoded, family: Family) -> dict[str, Any]:
    """One row as text with its trained tokens marked, for people to check before step 1."""
    tokenizer = family.processor.tokenizer
    pieces: list[dict[str, Any]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        trained = label != IGNORED
        if pieces and pieces[-1]["trained"] == trained:
            pieces[-1]["tokens"].append(token)
        else:
            pieces.append({"trained": trained, "tokens": [token]})
    for piece in pieces:
        text = tokenizer.decode(piece["tokens"], skip_special_tokens=False)
        # An image is hundreds of equal tokens; people want their number.
        if redact(text) != text:
            piece["tokens"] = []  # a secret of the row could be read from its tokens too
        piece["text"] = _REPEATED.sub(lambda m: f"{m[1]}×{len(m[0]) // len(m[1])}", text)
    return {
        "row": encoded.id,
        "tokens": len(encoded.input_ids),
        "trained_tokens": encoded.trained_tokens,
        "pieces": pieces,
        "marked": "".join(f"⟦{p['text']}⟧" if p["trained"] else p["text"] for p in pieces),
    }
