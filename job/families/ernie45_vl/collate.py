"""Collates tokenized rows to the inputs of `Ernie4_5_VLMoeForConditionalGeneration.forward`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from job.families import padding
from job.families.batches import PaddedBatch
from job.families.encoded import Encoded
from job.families.ernie45_vl.image_processing import Grid, mean_and_std, normalized, patches
from job.families.ernie45_vl.mrope import mrope_positions
from job.prep.images import decode

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor


def collate(rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> PaddedBatch:
    """A training batch, right-padded, with M-RoPE positions and the vision tower's indices."""
    batch = padding.right(rows, processor.tokenizer.pad_token_id)
    grids = _add_images(batch, rows, processor)
    if grids:
        _add_vision_indices(batch, grids, processor.image_processor.merge_size)
    _add_token_types(batch, processor)
    batch["position_ids"] = mrope_positions(
        image_flags(rows, processor),
        grids,
        spatial_merge_size=processor.image_processor.merge_size,
        length=batch["input_ids"].shape[1],
    )
    return batch


def collate_prompts(rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> PaddedBatch:
    """A generation batch, left-padded, without labels or positions."""
    batch = padding.left(rows, processor.tokenizer.pad_token_id)
    _add_images(batch, rows, processor)
    _add_token_types(batch, processor)
    return batch


def image_flags(rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> list[list[bool]]:
    """Flags the image tokens of each row."""
    image_token = processor.image_token_id
    return [[token == image_token for token in row.input_ids] for row in rows]


def image_brackets(ids: torch.Tensor, processor: "Ernie4_5_VLMoeProcessor") -> torch.Tensor:
    """Flags the tokens that start or end an image; same shape as `ids`."""
    return (ids == processor.image_start_token_id) | (ids == processor.image_end_token_id)


def patch_positions(grids: Sequence[Grid], merge: int) -> torch.Tensor:
    """Row and column of every patch, (patches, 2), in the vision tower's order."""
    by_grid = {grid: _patch_positions(grid, merge) for grid in set(grids)}
    return torch.cat([by_grid[grid] for grid in grids])


def _patch_positions(grid: Grid, merge: int) -> torch.Tensor:
    """Those of one image, (patches, 2): the patches of a merged block are consecutive."""
    _, height, width = grid
    positions = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    blocks = positions.view(height // merge, merge, width // merge, merge, 2)
    return blocks.transpose(1, 2).reshape(-1, 2)


def _add_images(
    batch: PaddedBatch, rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor"
) -> list[Grid]:
    images = [decode(image) for row in rows for image in row.images]
    if not images:
        return []
    pixels, grids = patches(images, processor.image_processor)
    batch["pixel_values"] = normalized(pixels, *mean_and_std(processor.image_processor))
    batch["image_grid_thw"] = torch.tensor(grids)  # (images, 3)
    return grids


def _add_vision_indices(batch: PaddedBatch, grids: Sequence[Grid], merge: int) -> None:
    """Adds the indices that the vision tower would otherwise compute on the device."""
    counts = torch.tensor([height * width for _, height, width in grids])
    batch["image_cu_seqlens"] = pad(counts.cumsum(0), (1, 0)).int()
    batch["image_position_ids"] = patch_positions(grids, merge)


def _add_token_types(batch: PaddedBatch, processor: "Ernie4_5_VLMoeProcessor") -> None:
    """Adds two type ids: image tokens, and tokens that are routed to the vision experts."""
    ids = batch["input_ids"]
    is_image = ids == processor.image_token_id
    batch["mm_token_type_ids"] = is_image.long()
    batch["moe_mm_token_type_ids"] = (is_image | image_brackets(ids, processor)).long()
