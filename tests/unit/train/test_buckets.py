"""Buckets of any batches: each fits into one, and their number is limited."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from job.families.encoded import RowSize
from job.families.ernie45_vl.packed.padding import bucket
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
