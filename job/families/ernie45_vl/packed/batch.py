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
from job.prep.rows import EncodedImage

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor


def pack(
    rows: Sequence[Encoded],
    processor: "Ernie4_5_VLMoeProcessor",
    bucket: PackedShape | None = None,
    *,
    images_once: bool = False,
) -> PackedBatch:
    """A training batch of the concatenated rows, T tokens in all, padded to a bucket if there is
    one.

    With `images_once`, the vision tower computes an image that several rows have, as the same
    object, once. Buckets do not allow it.
    """
    assert not (images_once and bucket)
    # Each token predicts its successor; the last one of a row has none.
    successors = torch.tensor([label for row in rows for label in (*row.labels[1:], IGNORED)])
    supervised = (successors != IGNORED).nonzero()[:, 0]  # (S,)
    together = _concatenated(
        rows, processor, supervised, successors[supervised], images_once=images_once
    )
    if bucket is None:
        return _batch(together, processor)
    batch = _batch(padded(together, bucket, processor), processor)
    batch["token_mask"] = torch.arange(bucket.tokens) < len(together.ids)
    return batch


def pack_prompts(prompts: Sequence[Encoded], processor: "Ernie4_5_VLMoeProcessor") -> PackedBatch:
    """The concatenated prompts; the last token of each is the "supervised" one, without a target.

    So the model computes the hidden states that predict the answers' first tokens. The vision tower
    computes an image once that several prompts have, as the same object: those of one question that
    is to be answered several times.
    """
    last = torch.tensor([len(prompt.input_ids) for prompt in prompts]).cumsum(0) - 1  # (N,)
    together = _concatenated(
        prompts, processor, last, torch.full_like(last, IGNORED), images_once=True
    )
    return _batch(together, processor)


def _concatenated(
    rows: Sequence[Encoded],
    processor: "Ernie4_5_VLMoeProcessor",
    supervised: torch.Tensor,
    targets: torch.Tensor,
    *,
    images_once: bool,
) -> Concatenated:
    ids = torch.tensor([token for row in rows for token in row.input_ids])  # (T,)
    lengths = [len(row.input_ids) for row in rows]
    is_image = ids == processor.image_token_id  # (T,)
    merge = processor.image_processor.merge_size
    images = [image for row in rows for image in row.images]
    computed, numbers = _different(images) if images_once else (images, range(len(images)))
    mean, _ = mean_and_std(processor.image_processor)
    pixels, grids = torch.empty(0, len(mean), dtype=torch.uint8), list[Grid]()
    places = torch.empty(0, 2, dtype=torch.long)
    if images:
        pixels, grids = patches([decode(image) for image in computed], processor.image_processor)
        places = patch_positions(grids, merge)
    grid = mrope_positions(
        image_flags(rows, processor),
        [grids[number] for number in numbers],
        spatial_merge_size=merge,
        length=max(lengths),
    )  # (3, N, L)
    patch_counts = [height * width for _, height, width in grids]
    return Concatenated(
        ids=ids,
        positions=grid.flatten(1)[:, PackedSequences.of(lengths).indices],
        is_vision=is_image | image_brackets(ids, processor),
        supervised=supervised,
        targets=targets,
        image_tokens=is_image.nonzero()[:, 0],
        image_sources=_merged_patches(grids, numbers, merge)
        if len(computed) < len(images)
        else None,
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
        if together.image_sources is not None:
            batch["image_token_sources"] = together.image_sources
    return batch


def _different(images: Sequence[EncodedImage]) -> tuple[list[EncodedImage], list[int]]:
    """The images without those that are the same object as an earlier one, and for each image its
    number among them."""
    numbers, different = dict[int, int](), list[EncodedImage]()
    for image in images:
        if numbers.setdefault(id(image), len(different)) == len(different):
            different.append(image)
    return different, [numbers[id(image)] for image in images]


def _merged_patches(grids: Sequence[Grid], numbers: Sequence[int], merge: int) -> torch.Tensor:
    """The indices of the merged patches of these images, (image tokens,); `grids` are those of the
    computed ones."""
    counts = [height * width // merge**2 for _, height, width in grids]
    of_each = torch.arange(sum(counts)).split(counts)
    return torch.cat([of_each[number] for number in numbers])
