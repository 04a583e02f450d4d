"""Packs tokenized rows into a batch without padding, with all indices that the step needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from job.families.base import IGNORED, Encoded
from job.families.batches import PackedBatch
from job.families.ernie45_vl.collate import image_brackets, image_flags, patch_positions
from job.families.ernie45_vl.image_processing import Grid, mean_and_std, patches
from job.families.ernie45_vl.mrope import mrope_positions
from job.families.ernie45_vl.packed.experts import Modalities
from job.families.ernie45_vl.packed.varlen_attention import PackedSequences
from job.prep.images import decode

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor


def pack(rows: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> PackedBatch:
    """A training batch of the concatenated rows, T tokens in all."""
    # Each token predicts its successor; the last one of a row has none.
    successors = torch.tensor([label for row in rows for label in (*row.labels[1:], IGNORED)])
    supervised = (successors != IGNORED).nonzero()[:, 0]  # (S,)
    return _packed(rows, processor, supervised, successors[supervised])


def pack_prompts(prompts: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> PackedBatch:
    """The concatenated prompts; the last token of each is the "supervised" one, without a target.

    So the model computes the hidden states that predict the answers' first tokens.
    """
    last = torch.tensor([len(prompt.input_ids) for prompt in prompts]).cumsum(0) - 1  # (N,)
    return _packed(prompts, processor, last, torch.full_like(last, IGNORED))


def _packed(
    rows: Sequence[Encoded],
    processor: "Ernie4_5_VLMoeProcessor",
    supervised: torch.Tensor,
    targets: torch.Tensor,
) -> PackedBatch:
    ids = torch.tensor([token for row in rows for token in row.input_ids])  # (T,)
    lengths = [len(row.input_ids) for row in rows]
    is_image = ids == processor.image_token_id  # (T,)
    is_vision = is_image | image_brackets(ids, processor)  # (T,)
    sequences = PackedSequences.of(lengths)
    tokens, of_supervised = Modalities.of(is_vision), Modalities.of(is_vision[supervised])
    merge = processor.image_processor.merge_size
    images = [decode(image) for row in rows for image in row.images]
    grids: list[Grid] = []
    if images:
        pixels, grids = patches(images, processor.image_processor)
    positions = mrope_positions(
        image_flags(rows, processor), grids, spatial_merge_size=merge, length=max(lengths)
    )  # (3, N, L)
    batch: PackedBatch = {
        "input_ids": ids[None],
        "supervised": supervised,
        "targets": targets,
        "row_indices": sequences.indices,
        "row_mask": sequences.mask,
        "row_cu_seqlens": sequences.cu_seqlens,
        "token_text": tokens.text,
        "token_vision": tokens.vision,
        "token_inverse": tokens.inverse,
        "supervised_text": of_supervised.text,
        "supervised_vision": of_supervised.vision,
        "supervised_inverse": of_supervised.inverse,
        "position_ids": positions.flatten(1)[:, None, sequences.indices],
    }
    if images:
        batch["pixels"] = pixels
        batch["pixel_mean"], batch["pixel_std"] = mean_and_std(processor.image_processor)
        per_image = PackedSequences.of([height * width for _, height, width in grids])
        batch["patch_indices"], batch["patch_mask"] = per_image.indices, per_image.mask
        batch["patch_cu_seqlens"] = per_image.cu_seqlens
        batch["patch_position_ids"] = patch_positions(grids, merge)
        batch["image_token_indices"] = is_image.nonzero()[:, 0]
    return batch
