"""Packs tokenized rows into a batch without padding, with all indices that the step needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from job.families.batches import PackedBatch
from job.families.encoded import IGNORED, Encoded
from job.families.ernie45_vl.collate import image_brackets, image_flags, patch_positions
from job.families.ernie45_vl.image_processing import Grid, mean_and_std, patches
from job.families.ernie45_vl.mrope import mrope_positions
from job.families.ernie45_vl.packed.experts import Modalities
from job.families.ernie45_vl.packed.padding import Concatenated, padded
from job.families.ernie45_vl.packed.varlen_attention import PackedSequences
from job.families.packed_shape import PackedShape
from job.prep.images import decode

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor


def pack(
    rows: Sequence[Encoded],
    processor: "Ernie4_5_VLMoeProcessor",
    bucket: PackedShape | None = None,
) -> PackedBatch:
    """A training batch of the concatenated rows, T tokens in all, padded to a bucket if there is
    one."""
    # Each token predicts its successor; the last one of a row has none.
    successors = torch.tensor([label for row in rows for label in (*row.labels[1:], IGNORED)])
    supervised = (successors != IGNORED).nonzero()[:, 0]  # (S,)
    together = _concatenated(rows, processor, supervised, successors[supervised])
    if bucket is None:
        return _batch(together, processor)
    batch = _batch(padded(together, bucket, processor), processor)
    batch["token_mask"] = torch.arange(bucket.tokens) < len(together.ids)
    return batch


def pack_prompts(prompts: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> PackedBatch:
    """The concatenated prompts; the last token of each is the "supervised" one, without a target.

    So the model computes the hidden states that predict the answers' first tokens.
    """
    last = torch.tensor([len(prompt.input_ids) for prompt in prompts]).cumsum(0) - 1  # (N,)
    together = _concatenated(prompts, processor, last, torch.full_like(last, IGNORED))
    return _batch(together, processor)


def _concatenated(
    rows: Sequence[Encoded],
    processor: "Ernie4_5_VLMoeProcessor",
    supervised: torch.Tensor,
    targets: torch.Tensor,
) -> Concatenated:
    ids = torch.tensor([token for row in rows for token in row.input_ids])  # (T,)
    lengths = [len(row.input_ids) for row in rows]
    is_image = ids == processor.image_token_id  # (T,)
    merge = processor.image_processor.merge_size
    images = [decode(image) for row in rows for image in row.images]
    mean, _ = mean_and_std(processor.image_processor)
    pixels, grids = torch.empty(0, len(mean), dtype=torch.uint8), list[Grid]()
    places = torch.empty(0, 2, dtype=torch.long)
    if images:
        pixels, grids = patches(images, processor.image_processor)
        places = patch_positions(grids, merge)
    grid = mrope_positions(
        image_flags(rows, processor), grids, spatial_merge_size=merge, length=max(lengths)
    )  # (3, N, L)
    patch_counts = [height * width for _, height, width in grids]
    return Concatenated(
        ids=ids,
        positions=grid.flatten(1)[:, PackedSequences.of(lengths).indices],
        is_vision=is_image | image_brackets(ids, processor),
        supervised=supervised,
        targets=targets,
        image_tokens=is_image.nonzero()[:, 0],
        lengths=lengths,
        longest=max(lengths),
        pixels=pixels,
        patch_positions=places,
        patch_counts=patch_counts,
        largest_image=max(patch_counts, default=0),
    )


def _batch(together: Concatenated, processor: "Ernie4_5_VLMoeProcessor") -> PackedBatch:
    sequences = PackedSequences.of(together.lengths, longest=together.longest)
    tokens = Modalities.of(together.is_vision)
    of_supervised = Modalities.of(together.is_vision[together.supervised])
    batch: PackedBatch = {
        "input_ids": together.ids[None],
        "supervised": together.supervised,
        "targets": together.targets,
        "row_indices": sequences.indices,
        "row_mask": sequences.mask,
        "row_cu_seqlens": sequences.cu_seqlens,
        "token_text": tokens.text,
        "token_vision": tokens.vision,
        "token_inverse": tokens.inverse,
        "supervised_text": of_supervised.text,
        "supervised_vision": of_supervised.vision,
        "supervised_inverse": of_supervised.inverse,
        "position_ids": together.positions[:, None],
    }
    if together.patch_counts:
        batch["pixels"] = together.pixels
        batch["pixel_mean"], batch["pixel_std"] = mean_and_std(processor.image_processor)
        per_image = PackedSequences.of(together.patch_counts, longest=together.largest_image)
        batch["patch_indices"], batch["patch_mask"] = per_image.indices, per_image.mask
        batch["patch_cu_seqlens"] = per_image.cu_seqlens
        batch["patch_position_ids"] = together.patch_positions
        batch["image_token_indices"] = together.image_tokens
    return batch
