"""Which implementation computes a grouped product: found by trying each on the device.

Torch's own is the fastest where it is one kernel. For other dtypes and devices it is a loop over
the experts that waits for the device at each call, which makes the host the bottleneck and cannot
be captured as a CUDA graph; the project's Triton kernels do neither. They need a C compiler on the
machine. Without one, and on a CPU, the loop remains.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers.integrations.moe import _grouped_mm as transformers_grouped_mm

from job import log
from job.families.grouped_products.operators import grouped_product
from job.families.outcome import (
    SLOWER,
    Outcome,
    attempt,
    first_line,
    left,
    synchronize,
    waits_are_errors,
)

GroupedMm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(M, in), (E, in, out) and the ends (E,) of each expert's rows, to (M, out)."""

WAYS: dict[str, GroupedMm] = {
    "torch": transformers_grouped_mm,
    "triton": grouped_product,
    "loop": transformers_grouped_mm,  # where torch's kernel does not apply, that is what it runs
}
KERNELS = ("torch", "triton")
"""The ways that are tried, in the order of preference."""
OFF, WAITS = "is off by", "waits for the device"
"""Reasons that hold at the next start too; another failure may be repaired."""
SYNCHRONIZES = "synchronizing CUDA operation"
"""What torch says of an operation that waits, in `waits_are_errors`."""


class _Sizes(NamedTuple):
    times: int
    """Times the rows of the smallest example."""
    inner: int
    width: int


SMALL = _Sizes(1, 96, 80)
"""Sizes that no tile divides, to compare."""
LARGE = _Sizes(8, 1024, 512)
"""2,048 rows, to time."""


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
    """Tries the implementations on the device, unless `use` has told the choice.

    The first call waits for the device, so it must not be in a capture: those run a pass first.
    """
    if device.type == "cpu":
        return Choice("loop", "no GPU")
    if (known := _known.get(dtype)) is not None:
        return known
    choice = decide([trial(way, device, dtype) for way in KERNELS])
    log.info("grouped products", dtype=str(dtype)[6:], way=choice.way, reason=choice.reason)
    return choice


def use(dtype: torch.dtype, choice: Choice) -> None:
    """Makes this the choice for the dtype on every GPU, without another trial."""
    _known[dtype] = choice
    choose.cache_clear()


def trial(way: str, device: torch.device, dtype: torch.dtype) -> Outcome:
    """The outcome for torch's kernel or Triton's, by its name in `WAYS`."""
    with torch.inference_mode(mode=False):  # for the gradients, if the first use is generation
        reason = is_right(WAYS[way], device, dtype)
        reason = reason or waits_for_nothing(WAYS[way], device, dtype)
        if reason is not None:
            return left(way, reason, passing=not reason.startswith((OFF, WAITS)))
        rows, weight, ends = _example(device, dtype, LARGE)
        exact = _results(_loop, rows.float(), weight.float(), ends)
        results = functools.partial(_results, WAYS[way], rows, weight, ends)
        return attempt(way, results, exact, tolerance=_tolerance(dtype))


def decide(outcomes: Sequence[Outcome]) -> Choice:
    """The first way that serves, unless another is much faster; else the loop."""
    served = [each for each in outcomes if each.taken]
    fastest = min((each.milliseconds or 0.0 for each in served), default=0.0)
    fast = [each for each in served if (each.milliseconds or 0.0) <= SLOWER * fastest]
    others = [f"{each.way}: {each.reason}" for each in outcomes if each not in fast[:1]]
    if not fast:
        return Choice("loop", "; ".join(others))
    return Choice(fast[0].way, "; ".join([fast[0].reason, *others]))


def waits_for_nothing(way: GroupedMm, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why not, if a product and its gradients fail or wait for the device; else None."""
    inputs = _example(device, dtype)
    try:
        _results(way, *inputs)  # loads kernels, which may wait
        synchronize(device)
        with waits_are_errors():
            _results(way, *inputs)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises: another one is taken
        line = first_line(error)
        return f"{WAITS}: {line}" if SYNCHRONIZES in line else line
    return None


def is_right(way: GroupedMm, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why not, if a product or its gradients fail or differ from a loop in fp64; else None."""
    rows, weight, ends = _example(device, dtype)
    exact = _results(_loop, rows.double(), weight.double(), ends)
    try:
        for found, expected in zip(_results(way, rows, weight, ends), exact, strict=True):
            off = float((found.double() - expected).norm() / expected.norm())
            if not off <= _tolerance(dtype):  # also if it is not a number
                return f"{OFF} {off:.1e}"
    except Exception as error:  # noqa: BLE001 - as above
        return first_line(error)
    return None


def _tolerance(dtype: torch.dtype) -> float:
    return max(4 * torch.finfo(dtype).eps, 1e-5)  # TF32 is off by more


def _example(
    device: torch.device, dtype: torch.dtype, sizes: _Sizes = SMALL
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of eight experts, one without any."""
    counts = torch.tensor([33, 0, 7, 130, 1, 64, 16, 5]) * sizes.times
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(int(counts.sum()), sizes.inner, generator=generator)
    weight = torch.randn(len(counts), sizes.width, sizes.inner, generator=generator)
    ends = counts.cumsum(0).to(device, torch.int32)
    return rows.to(device, dtype), weight.to(device, dtype).transpose(1, 2), ends


def _results(
    way: GroupedMm, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The product, and the gradients of rows and weight."""
    with torch.enable_grad():
        rows, weight = (tensor.detach().requires_grad_() for tensor in (rows, weight))
        out = way(rows, weight, ends)
        return out.detach(), *torch.autograd.grad(out, (rows, weight), out.detach())


def _loop(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = rows.split(counts)
    return torch.cat([part @ matrix for part, matrix in zip(parts, weight, strict=True)])
