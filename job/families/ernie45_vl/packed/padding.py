"""Padding of packed batches to a bucket, so that batches of many sizes have one shape.

The padding tokens are one more row, and the padding patches one more image, so no row attends to
them; they have no target. The bucket has a fixed number of tokens of each modality, because each
modality has its own experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from job.families.encoded import IGNORED
from job.families.packed_shape import PackedShape, largest

if TYPE_CHECKING:
    from transformers import Ernie4_5_VLMoeProcessor

TOKENS_MULTIPLE = 8
"""Matrix products are fastest if their sizes are multiples of 16 bytes."""


@dataclass(frozen=True, kw_only=True)
class Concatenated:
    """The content of N rows, T tokens and their images, before the step's indices are computed."""

    ids: torch.Tensor
    """(T,)"""
    positions: torch.Tensor
    """(3, T): M-RoPE positions."""
    is_vision: torch.Tensor
    """(T,), bool: tokens for the vision experts."""
    supervised: torch.Tensor
    """(S,): indices of the tokens whose successor is supervised."""
    targets: torch.Tensor
    """(S,): those successors; `IGNORED` for padding."""
    image_tokens: torch.Tensor
    """(image tokens,): indices of the tokens that stand for merged patches."""
    lengths: list[int]
    """Tokens of each row; rows may be empty."""
    longest: int
    """The most tokens that any row may have."""
    pixels: torch.Tensor
    """(patches, channels · patch_size²), uint8; empty without images."""
    patch_positions: torch.Tensor
    """(patches, 2)"""
    patch_counts: list[int]
    """Patches of each image; images may be empty."""
    largest_image: int
    """The most patches that any image may have."""


def bucket(shapes: Sequence[PackedShape], *, merged_patches: int) -> PackedShape:
    """The smallest shape that batches of all these shapes can be padded to.

    It has room for the row and the image of the padding, and at least one padding token that is
    text. `merged_patches` patches become one image token.
    """
    most = largest(shapes)
    has_images = most.images > 0
    images = most.images + has_images
    patches = most.patches + merged_patches * has_images
    # Enough for the image tokens of the padding, however many images a batch has.
    vision = max(most.vision, patches // merged_patches + 2 * images)
    text = most.text + 1
    text += -(text + vision) % TOKENS_MULTIPLE
    padding_tokens = text + vision - min(shape.tokens for shape in shapes)
    padding_patches = patches - min(shape.patches for shape in shapes)
    return most._replace(
        rows=most.rows + 1,
        text=text,
        vision=vision,
        longest=max(most.longest, padding_tokens),
        images=images,
        patches=patches,
        largest_image=max(most.largest_image, padding_patches),
    )


def padded(
    rows: Concatenated, bucket: PackedShape, processor: "Ernie4_5_VLMoeProcessor"
) -> Concatenated:
    """The rows, followed by the padding that the bucket leaves room for."""
    count = len(rows.ids)
    vision = bucket.vision - int(rows.is_vision.sum())
    text = bucket.tokens - count - vision
    patches = bucket.patches - len(rows.pixels)
    supervised = bucket.supervised - len(rows.supervised)
    image_tokens = bucket.patches // processor.image_processor.merge_size**2
    image_tokens -= len(rows.image_tokens)
    assert min(text - 1, vision, patches, supervised, image_tokens, vision - image_tokens) >= 0
    assert text + vision <= bucket.longest
    assert patches <= bucket.largest_image or not bucket.images
    ids = [torch.full((text,), processor.tokenizer.pad_token_id)]
    ids.append(torch.full((vision,), processor.image_token_id))
    return Concatenated(
        ids=torch.cat([rows.ids, *ids]),
        positions=pad(rows.positions, (0, text + vision)),
        is_vision=torch.cat([rows.is_vision, torch.arange(text + vision) >= text]),
        # Any padding token that is text: without a target, its gradient is zero.
        supervised=pad(rows.supervised, (0, supervised), value=count),
        targets=pad(rows.targets, (0, supervised), value=IGNORED),
        image_tokens=torch.cat([rows.image_tokens, count + text + torch.arange(image_tokens)]),
        lengths=_filled(rows.lengths, text + vision, bucket.rows),
        longest=bucket.longest,
        pixels=pad(rows.pixels, (0, 0, 0, patches)),
        patch_positions=pad(rows.patch_positions, (0, 0, 0, patches)),
        patch_counts=_filled(rows.patch_counts, patches, bucket.images),
        largest_image=bucket.largest_image,
    )


def _filled(counts: list[int], added: int, total: int) -> list[int]:
    """The counts, then one of what is added, then zeros."""
    if not total:
        return []
    return [*counts, added, *[0] * (total - len(counts) - 1)]
