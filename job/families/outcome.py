"""Trials of ways to compute: against plain arithmetic, forward and backward, and timed."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from textwrap import shorten
from typing import Any

import torch

SLOWER = 3.0
"""How many times slower than the alternative a way may be on the device at a trial's small size,
where smaller differences say little of a model's sizes."""
REPEATS = 10
AHEAD = 20_000_000
"""Clock cycles, about 10 ms, that a GPU waits while the host launches what is timed."""
LONGEST = 200
"""Characters of a reason."""

Results = Callable[[], Sequence[torch.Tensor]]
"""Computes outputs, then gradients."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the trial of a way found."""

    way: str
    taken: bool
    reason: str
    """Why it was taken or left."""
    milliseconds: float | None = None
    """Of a forward and backward pass at the trial's size; None if it did not get that far."""
    off: float | None = None
    """The largest relative difference (in the norm) to the exact results."""
    passing: bool = False
    """Whether another trial may end otherwise, so that this one is not kept: it failed, took too
    long, or was slower."""
    untried: bool = False
    """Whether it says nothing of the way, which is tried by its first use: memory was full, or no
    trial could run."""

    def __str__(self) -> str:
        return f"{'taken' if self.taken else 'left'}: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """Its fields, with null for a number that is not finite, which JSON cannot hold."""
        off = self.off if self.off is not None and math.isfinite(self.off) else None
        return asdict(self) | {"off": off}


def left(way: str, reason: str, *, passing: bool = False, untried: bool = False) -> Outcome:
    """A way that is left; what was not tried is never kept."""
    return Outcome(way=way, taken=False, reason=reason, passing=passing or untried, untried=untried)


def failed(way: str, error: Exception) -> Outcome:
    """A way whose trial raised the error, which another start may not: a compiler is installed, a
    driver replaced."""
    full = isinstance(error, torch.OutOfMemoryError)
    return left(way, first_line(error), passing=True, untried=full)


def attempt(
    way: str,
    results: Results,
    exact: Sequence[torch.Tensor],
    *,
    tolerance: float,
    work: Results | None = None,
) -> Outcome:
    """Computes and compares the results, and times `work`, by default the same. Never raises.

    `tolerance` bounds the difference of each result to its exact one, relative to its norm.
    """
    try:
        found = results()
        off = difference(found, exact)
        if not off <= tolerance:  # also if it is not a number
            return Outcome(way=way, taken=False, reason=f"is off by {off:.1e}", off=off)
        taken = milliseconds(work or results, found[0].device)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises, another way is taken
        return failed(way, error)
    reason = f"{taken:.2f} ms, off by {off:.0e}"
    return Outcome(way=way, taken=True, reason=reason, milliseconds=taken, off=off)


def unless_slower(outcome: Outcome, other: float, than: str) -> Outcome:
    """Leaves the way for now if `than`, which took `other` milliseconds, is much faster."""
    own = outcome.milliseconds
    if not outcome.taken or own is None:
        return outcome
    compared = f"{own:.2f} ms, {than} {other:.2f} ms"
    taken = own <= SLOWER * other
    reason = f"{compared}, off by {outcome.off:.0e}" if taken else f"slower: {compared}"
    return replace(outcome, taken=taken, reason=reason, passing=not taken)


def difference(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest difference of a tensor to the exact one, relative to its norm.

    Infinite if a value is not finite; compared in fp64.
    """
    largest = 0.0
    for one, other in zip(found, exact, strict=True):
        norm = float(other.double().norm())
        off = float((one.double() - other.double()).norm()) / (norm or 1.0)
        largest = max(largest, off if math.isfinite(off) else math.inf)
    return largest


def milliseconds(work: Results, device: torch.device) -> float:
    """The time of the fastest of a few runs, after one that does not count: the device's own."""
    clock = _milliseconds_on_host if device.type == "cpu" else _milliseconds_on_gpu
    work()
    return min(clock(work) for _ in range(REPEATS))


def _milliseconds_on_host(work: Results) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def _milliseconds_on_gpu(work: Results) -> float:
    """Of the current GPU, which first waits, so that all is launched before it begins: a host that
    is busy with other work does not count."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """A context in which an operation that makes the host wait for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def first_line(error: Exception) -> str:
    """What an error says, in one line: some list every backend of torch."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return shorten(line, LONGEST, placeholder=" …")
