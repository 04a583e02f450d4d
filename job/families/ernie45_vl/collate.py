"""Encoded rows to the tensors that `Ernie4_5_VLMoeForConditionalGeneration.forward` takes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from job.families.base import IGNORED, Batch, Encoded
from job.families.ernie45_vl.positions import rope_positions
from job.prep.images import decode

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor


def collate(rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> Batch:
    """A training batch of B rows, right-padded to the longest, T tokens.

    Gives `input_ids`, `labels`, `attention_mask`, `mm_token_type_ids`, `moe_mm_token_type_ids`
    (B, T), `position_ids` (3, B, T), and where there are images `pixel_values` (patches, 588) and
    `image_grid_thw` (images, 3).
    """
    length = max(len(row.input_ids) for row in rows)
    pad = processor.tokenizer.pad_token_id
    batch: Batch = {
        "input_ids": torch.tensor([_right(row.input_ids, length, pad) for row in rows]),
        "labels": torch.tensor([_right(row.labels, length, IGNORED) for row in rows]),
        "attention_mask": torch.tensor(
            [_right([1] * len(row.input_ids), length, 0) for row in rows]
        ),
    }
    grids = _add_images(batch, rows, processor)
    _add_token_types(batch, processor)
    image_token = processor.image_token_id
    batch["position_ids"] = rope_positions(
        [[token == image_token for token in row.input_ids] for row in rows],
        grids,
        spatial_merge_size=processor.image_processor.merge_size,
        length=length,
    )
    return batch


def collate_prompts(rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> Batch:
    """A generation batch: the same without labels and positions, padded on the left."""
    length = max(len(row.input_ids) for row in rows)
    pad = processor.tokenizer.pad_token_id
    batch: Batch = {
        "input_ids": torch.tensor([_left(row.input_ids, length, pad) for row in rows]),
        "attention_mask": torch.tensor(
            [_left([1] * len(row.input_ids), length, 0) for row in rows]
        ),
    }
    _add_images(batch, rows, processor)
    _add_token_types(batch, processor)
    return batch


def _add_images(
    batch: Batch, rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor"
) -> list[tuple[int, int, int]]:
    images = [decode(image) for row in rows for image in row.images]
    if not images:
        return []
    pixels = processor.image_processor(images=images, return_tensors="pt")
    batch["pixel_values"] = pixels["pixel_values"]  # (patches, channels * patch_size**2)
    batch["image_grid_thw"] = pixels["image_grid_thw"]  # (images, 3)
    return [(int(t), int(h), int(w)) for t, h, w in pixels["image_grid_thw"].tolist()]


def _add_token_types(batch: Batch, processor: "Ernie4_5_VLMoeProcessor") -> None:
    """The two token types: images alone for positions, their brackets too for the experts."""
    ids = batch["input_ids"]
    image = ids == processor.image_token_id
    brackets = (ids == processor.image_start_token_id) | (ids == processor.image_end_token_id)
    batch["mm_token_type_ids"] = image.long()
    batch["moe_mm_token_type_ids"] = (image | brackets).long()


def _right(values: Sequence[int], length: int, fill: int) -> list[int]:
    return [*values, *[fill] * (length - len(values))]


def _left(values: Sequence[int], length: int, fill: int) -> list[int]:
    return [*[fill] * (length - len(values)), *values]
