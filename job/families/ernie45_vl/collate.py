"""Encoded rows to the tensors that `Ernie4_5_VLMoeForConditionalGeneration.forward` takes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from job.families import padding
from job.families.base import Batch, Encoded
from job.families.ernie45_vl.image_processing import Grid, normalised, patches, scale
from job.families.ernie45_vl.mrope import rope_positions
from job.prep.images import decode

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor


def collate(rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> Batch:
    """A training batch of B rows, right-padded to the longest, T tokens.

    Gives `input_ids`, `labels`, `attention_mask`, `mm_token_type_ids`, `moe_mm_token_type_ids`
    (B, T), `position_ids` (3, B, T), and where there are images `pixel_values` (patches, 588),
    `image_grid_thw` (images, 3) and the vision tower's own indices.
    """
    batch = padding.right(rows, processor.tokenizer.pad_token_id)
    grids = _add_images(batch, rows, processor)
    if grids:
        _add_vision_indices(batch, grids, processor.image_processor.merge_size)
    _add_token_types(batch, processor)
    image_token = processor.image_token_id
    batch["position_ids"] = rope_positions(
        [[token == image_token for token in row.input_ids] for row in rows],
        grids,
        spatial_merge_size=processor.image_processor.merge_size,
        length=batch["input_ids"].shape[1],
    )
    return batch


def collate_prompts(rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> Batch:
    """A generation batch: the same without labels and positions, padded on the left."""
    batch = padding.left(rows, processor.tokenizer.pad_token_id)
    _add_images(batch, rows, processor)
    _add_token_types(batch, processor)
    return batch


def _add_images(
    batch: Batch, rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor"
) -> list[Grid]:
    images = [decode(image) for row in rows for image in row.images]
    if not images:
        return []
    found, grids = patches(images, processor.image_processor)
    batch["pixel_values"] = normalised(found, *scale(processor.image_processor))
    batch["image_grid_thw"] = torch.tensor(grids)  # (images, 3)
    return grids


def _add_vision_indices(batch: Batch, grids: Sequence[Grid], merge: int) -> None:
    """What the vision tower would work out from the grids, image by image, on the device.

    `image_cu_seqlens` (images + 1) bounds each image's patches, `image_position_ids` (patches, 2)
    holds each patch's row and column, in the order of merged blocks.
    """
    counts = torch.tensor([height * width for _, height, width in grids])
    batch["image_cu_seqlens"] = pad(counts.cumsum(0), (1, 0)).int()
    batch["image_position_ids"] = patch_places(grids, merge)


def patch_places(grids: Sequence[Grid], merge: int) -> torch.Tensor:
    """Row and column of each patch of the images, (patches, 2), in the order of merged blocks."""
    made = {grid: _patch_places(grid, merge) for grid in set(grids)}
    return torch.cat([made[grid] for grid in grids])


def _patch_places(grid: Grid, merge: int) -> torch.Tensor:
    """Row and column of each patch of one image, (patches, 2), merged blocks one after another."""
    _, height, width = grid
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    blocks = places.view(height // merge, merge, width // merge, merge, 2)
    return blocks.transpose(1, 2).reshape(-1, 2)


def _add_token_types(batch: Batch, processor: "Ernie4_5_VLMoeProcessor") -> None:
    """The two token types: images alone for positions, their brackets too for the experts."""
    ids = batch["input_ids"]
    image = ids == processor.image_token_id
    brackets = (ids == processor.image_start_token_id) | (ids == processor.image_end_token_id)
    batch["mm_token_type_ids"] = image.long()
    batch["moe_mm_token_type_ids"] = (image | brackets).long()
