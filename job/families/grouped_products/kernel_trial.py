"""Tries an implementation of grouped products: against a loop in fp64, for waits, and timed.

Imports no Transformers, which takes longer than Triton's kernels take to compile.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from job.families.outcome import (
    Outcome,
    attempt,
    first_line,
    left,
    synchronize,
    waits_are_errors,
)

GroupedMm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(M, in), (E, in, out) and the ends (E,) of each expert's rows, to (M, out)."""
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


def trial(name: str, way: GroupedMm, device: torch.device, dtype: torch.dtype) -> Outcome:
    """The outcome for an implementation, by its name."""
    with torch.inference_mode(mode=False):  # for the gradients, if the first use is generation
        reason = is_right(way, device, dtype) or waits_for_nothing(way, device, dtype)
        if reason is not None:
            return left(name, reason, passing=not reason.startswith((OFF, WAITS)))
        rows, weight, ends = _example(device, dtype, LARGE)
        exact = _results(loop, rows.float(), weight.float(), ends)
        results = functools.partial(_results, way, rows, weight, ends)
        return attempt(name, results, exact, tolerance=_tolerance(dtype))


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
    exact = _results(loop, rows.double(), weight.double(), ends)
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


def loop(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = rows.split(counts)
    return torch.cat([part @ matrix for part, matrix in zip(parts, weight, strict=True)])
