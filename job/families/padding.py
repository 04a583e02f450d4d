"""Encoded rows of different lengths as one batch of tokens."""

from collections.abc import Sequence

import torch

from job.families.base import IGNORED, Batch, Encoded


def right(rows: Sequence[Encoded], filler: int) -> Batch:
    """`input_ids`, `labels`, `attention_mask` (B, T) for training, padded after each row."""
    length = max(len(row.input_ids) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (length - len(values))]

    return {
        "input_ids": torch.tensor([padded(row.input_ids, filler) for row in rows]),
        "labels": torch.tensor([padded(row.labels, IGNORED) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
    }


def left(rows: Sequence[Encoded], filler: int) -> Batch:
    """`input_ids`, `attention_mask` (B, T) for generation, padded before each row."""
    length = max(len(row.input_ids) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*[fill] * (length - len(values)), *values]

    return {
        "input_ids": torch.tensor([padded(row.input_ids, filler) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
    }
