"""RoPE as two products and a sum: Transformers' values and gradients, for both pairings."""

from collections.abc import Callable

import pytest
import torch
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

from job.families.ernie45_vl.packed.rope import (
    RotaryAngles,
    SwapPairs,
    apply_rope,
    swap_halves,
    swap_neighbors,
)

D = 8


def tables(swap: SwapPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, (T, D), of one angle for both numbers of a pair."""
    angles = torch.randn(5, D)
    angles = torch.where(swap(torch.arange(D)) > torch.arange(D), angles, swap(angles))
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("swap", "theirs"),
    [
        (swap_halves, native.apply_rotary_pos_emb_vision),
        (swap_neighbors, native.apply_rotary_pos_emb),
    ],
    ids=["swap_halves", "swap_neighbors"],
)
def test_values_and_gradients_are_those_of_transformers(
    swap: SwapPairs, theirs: Callable[..., tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    cos, sin = tables(swap)
    values, slope = torch.randn(5, 3, D).to(dtype), torch.randn(5, 3, D).to(dtype)
    # Theirs in fp32 of the same numbers: in bf16 they round a gradient that they add up.
    exact = values.float().requires_grad_()
    expected = theirs(exact, exact, cos, sin)[0]
    given = values.clone().requires_grad_()
    out = apply_rope(given, RotaryAngles.of(cos, sin, swap), swap)
    torch.testing.assert_close(out, expected.to(dtype))
    [wanted] = torch.autograd.grad(expected, exact, slope.float())
    [gradient] = torch.autograd.grad(out, given, slope)
    torch.testing.assert_close(gradient, wanted.to(dtype))


@pytest.mark.parametrize("swap", [swap_halves, swap_neighbors])
def test_a_rotation_keeps_lengths(swap: SwapPairs) -> None:
    torch.manual_seed(1)
    values = torch.randn(5, 3, D)
    turned = apply_rope(values, RotaryAngles.of(*tables(swap), swap), swap)
    torch.testing.assert_close(turned.norm(dim=-1), values.norm(dim=-1))
    assert not torch.allclose(turned, values)
