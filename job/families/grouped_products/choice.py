"""Which implementation computes a grouped product: found by trying each on the device.

Torch's own is the fastest where it is one kernel. For other dtypes and devices it is a loop over
the experts that waits for the device at each call, which makes the host the bottleneck and cannot
be captured as a CUDA graph; the project's Triton kernels do neither. They need a C compiler on the
machine. Without one, and on a CPU, the loop remains.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers.integrations.moe import _grouped_mm as transformers_grouped_mm

from job import log
from job.families.grouped_products.kernel_trial import GroupedMm, trial
from job.families.grouped_products.operators import grouped_product
from job.families.outcome import SLOWER, Outcome

WAYS: dict[str, GroupedMm] = {
    "torch": transformers_grouped_mm,
    "triton": grouped_product,
    "loop": transformers_grouped_mm,  # where torch's kernel does not apply, that is what it runs
}
KERNELS = ("torch", "triton")
"""The ways that are tried, in the order of preference."""


class Choice(NamedTuple):
    """The implementation for a device and dtype, by its name in `WAYS`."""

    way: str
    reason: str


_known: dict[torch.dtype, Choice] = {}


def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(M, in) by (E, in, out) to (M, out): each row by the matrix of its expert.

    Rows are sorted by expert, and expert e's end at `ends[e]`, (E,) int32; every row belongs to an
    expert. Differentiable with respect to rows and weight.
    """
    way = WAYS[_way(weight.device, weight.dtype)]
    return way(rows.to(weight.dtype), weight, ends)


@torch.compiler.assume_constant_result
def _way(device: torch.device, dtype: torch.dtype) -> str:
    return choose(device, dtype).way


@functools.cache
def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """Tries the implementations on the device, unless `use` has set the choice.

    The first call waits for the device, so it must not be in a capture: those run a pass first.
    """
    if device.type == "cpu":
        return Choice("loop", "no GPU")
    if (known := _known.get(dtype)) is not None:
        return known
    choice = decide([trial(way, WAYS[way], device, dtype) for way in KERNELS])
    log.info("grouped products", dtype=str(dtype)[6:], way=choice.way, reason=choice.reason)
    return choice


def use(dtype: torch.dtype, choice: Choice) -> None:
    """Makes this the choice for the dtype on every GPU, without another trial."""
    _known[dtype] = choice
    choose.cache_clear()


def decide(outcomes: Sequence[Outcome]) -> Choice:
    """The first way that serves, unless another is much faster; else the loop."""
    served = [each for each in outcomes if each.taken]
    fastest = min((each.milliseconds or 0.0 for each in served), default=0.0)
    fast = [each for each in served if (each.milliseconds or 0.0) <= SLOWER * fastest]
    others = [f"{each.way}: {each.reason}" for each in outcomes if each not in fast[:1]]
    if not fast:
        return Choice("loop", "; ".join(others))
    return Choice(fast[0].way, "; ".join([fast[0].reason, *others]))
