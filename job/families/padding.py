"""Pads tokenized rows to the longest row of a batch."""

from collections.abc import Sequence

import torch

from job.families.batches import PaddedBatch
from job.families.encoded import IGNORED, Encoded


def right(rows: Sequence[Encoded], padding_token: int) -> PaddedBatch:
    """Right padding, for training: `input_ids`, `labels` and `attention_mask`, (B, T) each."""
    length = max(len(row.input_ids) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (length - len(values))]

    return {
        "input_ids": torch.tensor([padded(row.input_ids, padding_token) for row in rows]),
        "labels": torch.tensor([padded(row.labels, IGNORED) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
    }


def left(rows: Sequence[Encoded], padding_token: int) -> PaddedBatch:
    """Left padding, for generation: `input_ids` and `attention_mask`, (B, T) each."""
    length = max(len(row.input_ids) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*[fill] * (length - len(values)), *values]

    return {
        "input_ids": torch.tensor([padded(row.input_ids, padding_token) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
    }
