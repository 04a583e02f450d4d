"""Buckets of any batches: each fits into one, and their number is limited."""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job.families.encoded import RowSize
from job.families.ernie45_vl.packed.padding import Concatenated, bucket, padded
from job.families.packed_shape import PackedShape
from job.train.buckets import MAX_BUCKETS, choose_buckets

MERGED = 4
cover = functools.partial(bucket, merged_patches=MERGED)


@st.composite
def rows(draw: st.DrawFn) -> RowSize:
    patches = tuple(MERGED * n for n in draw(st.lists(st.integers(1, 1500), max_size=3)))
    vision = sum(count // MERGED + 2 for count in patches)
    text = draw(st.integers(2, 9000))
    return RowSize(
        tokens=text + vision,
        image_tokens=vision,
        supervised_tokens=draw(st.integers(1, text - 1)),
        patches=patches,
    )


BATCHES = st.lists(st.lists(rows(), min_size=1, max_size=4).map(PackedShape.of), min_size=1)


@settings(max_examples=60, deadline=None)
@given(shapes=BATCHES, repeats=st.sampled_from([1, 1, 50]))
def test_any_batches_fit_into_few_buckets_each_of_which_has_one(
    shapes: list[PackedShape], repeats: int
) -> None:
    buckets = choose_buckets(shapes * repeats, cover)
    assert 1 <= len(buckets.shapes) <= MAX_BUCKETS
    assert 0 <= buckets.padding < 1
    assert all(buckets.of(each) is not None for each in shapes)
    # A capture takes one of the batches that fit.
    assert all(any(each.fits(shape) for each in shapes) for shape in buckets.shapes)
    assert choose_buckets(shapes * repeats, cover) == buckets


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(st.lists(rows(), min_size=1, max_size=4), min_size=2, max_size=8))
def test_padding_is_of_rows_and_images_no_longer_than_the_batches_have(
    batches: list[list[RowSize]],
) -> None:
    shapes = [PackedShape.of(batch) for batch in batches]
    # Also in buckets of other batches, into which they happen to fit.
    for chosen in (cover(shapes), *(cover([shape]) for shape in shapes)):
        for batch in (batch for batch in batches if PackedShape.of(batch).fits(chosen)):
            content = concatenated(batch)
            found = padded(content, chosen, PROCESSOR)
            assert len(found.ids) == sum(found.lengths) == chosen.tokens
            assert len(found.pixels) == sum(found.patch_counts) == chosen.patches
            assert int(found.is_vision.sum()) == chosen.vision
            assert len(found.image_tokens) == chosen.patches // MERGED
            assert found.is_vision[found.image_tokens].all()
            assert len(found.targets) == chosen.supervised
            assert (len(found.lengths), len(found.patch_counts)) == (chosen.rows, chosen.images)
            assert max(found.lengths) <= chosen.longest
            assert max(found.patch_counts, default=0) <= chosen.largest_image
            assert found.lengths[: len(batch)] == content.lengths
            assert found.patch_counts[: len(content.patch_counts)] == content.patch_counts
    whole = cover(shapes)
    assert whole.longest == max(shape.longest for shape in shapes)
    assert whole.largest_image == max(shape.largest_image for shape in shapes)


PROCESSOR: Any = SimpleNamespace(
    tokenizer=SimpleNamespace(pad_token_id=0),
    image_token_id=1,
    image_processor=SimpleNamespace(merge_size=2),
)


def concatenated(batch: list[RowSize]) -> Concatenated:
    """Rows of these sizes: the tokens of their images first, then text."""
    is_vision, image_tokens, begin = list[bool](), list[int](), 0
    for row in batch:
        for patches in row.patches:
            image_tokens += range(begin + 1, begin + 1 + patches // MERGED)
            begin += patches // MERGED + 2
        is_vision += [True] * row.image_tokens + [False] * (row.tokens - row.image_tokens)
        begin = len(is_vision)
    shape = PackedShape.of(batch)
    return Concatenated(
        ids=torch.ones(shape.tokens, dtype=torch.long),
        positions=torch.zeros(3, shape.tokens, dtype=torch.long),
        is_vision=torch.tensor(is_vision),
        supervised=torch.zeros(shape.supervised, dtype=torch.long),
        targets=torch.zeros(shape.supervised, dtype=torch.long),
        image_tokens=torch.tensor(image_tokens, dtype=torch.long),
        lengths=[row.tokens for row in batch],
        longest=shape.longest,
        pixels=torch.zeros(shape.patches, 1, dtype=torch.uint8),
        patch_positions=torch.zeros(shape.patches, 2, dtype=torch.long),
        patch_counts=[patches for row in batch for patches in row.patches],
        largest_image=shape.largest_image,
    )


def test_sizes_are_read_a_few_times_however_many_batches_are_divided() -> None:
    read = {"times": 0}

    class Counted(PackedShape):
        @property
        def text(self) -> int:
            read["times"] += 1
            return self[1]

    count = 3_000
    shapes = [
        Counted._make((4, 200 + n, 6 * (n % 7), 60, 100, n % 7, 16 * (n % 7), 16))
        for n in range(count)
    ]
    buckets = choose_buckets(shapes, cover)
    assert len(buckets.shapes) > 1
    assert read["times"] < 40 * count
