"""A packed batch that is padded to a bucket has the loss and the gradients of its rows alone."""

from typing import Any

import pytest
import torch

from job.families.ernie45_vl import Ernie45VL
from job.families.packed_shape import PackedShape
from tests.unit.families.test_packed_step import BATCHES, adapted, family, near, plain, step

__all__ = ["family", "plain"]  # fixtures


def bucket(family: Ernie45VL, *names: str) -> PackedShape:
    """The bucket of these batches."""
    sizes = [[family.row_size(family.encode(row)) for row in BATCHES[name]] for name in names]
    return family.bucket([PackedShape.of(each) for each in sizes])


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("experts", [False, True], ids=["reference targets", "routed experts"])
def test_padding_changes_no_loss_and_no_gradient(
    family: Ernie45VL, plain: Any, name: str, experts: bool
) -> None:
    rows = [family.encode(row) for row in BATCHES[name]]
    loss, grads = step(adapted(plain, packed=True, experts=experts), family.pack(rows))
    every = bucket(family, *BATCHES)
    padded = family.pack(rows, every)
    assert padded["input_ids"].numel() == every.tokens > family.pack(rows)["input_ids"].numel()
    padded_loss, padded_grads = step(adapted(plain, packed=True, experts=experts), padded)
    near(padded_loss, loss, "loss")
    assert any(float(grad.abs().max()) > 1e-4 for grad in grads.values())
    # Padding also passes through the vision tower, without an effect on the loss.
    for parameter, grad in padded_grads.items():
        near(grad, grads.get(parameter, torch.zeros_like(grad)), parameter)


def test_padding_does_not_count_in_the_router_s_auxiliary_loss(
    family: Ernie45VL, plain: Any
) -> None:
    model = adapted(plain, packed=True, experts=False)
    family.set_router_aux_loss(model.get_base_model(), 0.5)
    rows = [family.encode(row) for row in BATCHES["mixed images"]]
    with torch.no_grad():
        expected = model(**family.pack(rows)).aux_loss
        found = model(**family.pack(rows, bucket(family, *BATCHES))).aux_loss
    near(found, expected, "auxiliary loss")


def test_all_batches_of_a_bucket_have_equal_shapes(family: Ernie45VL) -> None:
    every = bucket(family, *BATCHES)
    shapes = []
    for rows in BATCHES.values():
        batch: Any = family.pack([family.encode(row) for row in rows], every)
        shapes.append({name: (value.shape, value.dtype) for name, value in batch.items()})
    assert all(each == shapes[0] for each in shapes)


def test_a_bucket_of_one_shape_has_little_padding(family: Ernie45VL) -> None:
    name = "equal images"
    rows = [family.row_size(family.encode(row)) for row in BATCHES[name]]
    assert bucket(family, name).tokens - PackedShape.of(rows).tokens <= 16
