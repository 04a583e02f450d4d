"""Padding of packed batches to a bucket, so that batches of many sizes have one shape.

The padding tokens are more rows, and the padding patches more images, so no row attends to them;
they have no target. They are about as long as the others: attention takes time with the square of
a length, and one long row of padding would cost more than all that it completes. The bucket has a
fixed number of tokens of each modality, because each modality has its own experts.
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
    image_sources: torch.Tensor | None = None
    """(image tokens,): which merged patch each stands for, if images are repeated."""
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

    It has room for the rows and the images of the padding, and at least one padding token that is
    text. `merged_patches` patches become one image token.
    """
    most = largest(shapes)
    patches = most.patches + (merged_patches if most.images else 0)
    padding_patches = patches - min(shape.patches for shape in shapes)
    images = most.images + _parts(padding_patches, most.patches, most.images)
    # Enough for the image tokens of the padding, however many images a batch has.
    vision = max(most.vision, patches // merged_patches + 2 * images)
    text = most.text + 1
    text += -(text + vision) % TOKENS_MULTIPLE
    padding_tokens = text + vision - min(shape.tokens for shape in shapes)
    return most._replace(
        rows=most.rows + _parts(padding_tokens, most.tokens, most.rows),
        text=text,
        vision=vision,
        images=images,
        patches=patches,
    )


def _parts(padding: int, total: int, count: int) -> int:
    """How many rows (or images) of padding it takes for none to be longer than an average one.

    The average is that of `count` rows of `total` tokens.
    """
    return -(-padding * count // total) if count else 0


def padded(
    rows: Concatenated, bucket: PackedShape, processor: "Ernie4_5_VLMoeProcessor"
) -> Concatenated:
    """The rows, followed by the padding that the bucket leaves room for."""
    count = len(rows.ids)
    vision = bucket.vision - int(rows.is_vision.sum())
    text = bucket.tokens - count - vision
    patches = bucket.patches - len(rows.pixels)
    supervised = bucket.supervised - len(rows.supervised)
    merged_patches = processor.image_processor.merge_size**2
    image_tokens = bucket.patches // merged_patches - len(rows.image_tokens)
    assert min(text - 1, vision, patches, supervised, image_tokens, vision - image_tokens) >= 0
    lengths = _filled(rows.lengths, text + vision, bucket.rows)
    patch_counts = _filled(rows.patch_counts, patches, bucket.images, multiple=merged_patches)
    assert max(lengths) <= bucket.longest
    assert max(patch_counts, default=0) <= bucket.largest_image
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
        lengths=lengths,
        longest=bucket.longest,
        pixels=pad(rows.pixels, (0, 0, 0, patches)),
        patch_positions=pad(rows.patch_positions, (0, 0, 0, patches)),
        patch_counts=patch_counts,
        largest_image=bucket.largest_image,
    )


def _filled(counts: list[int], added: int, total: int, *, multiple: int = 1) -> list[int]:
    """`counts`, followed by what is added in equal parts, multiples of `multiple`: `total` in all.

    The last parts may be smaller, or empty.
    """
    parts = total - len(counts)
    if not parts:
        return counts
    part = -(-added // (multiple * parts)) * multiple
    return [*counts, *(max(min(part, added - n * part), 0) for n in range(parts))]
