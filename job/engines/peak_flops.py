"""Peak speeds of GPUs: dense matrix products in bf16 (and fp16), by the vendors' data sheets."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from job.engines.device import Accelerator


@dataclass(frozen=True, kw_only=True)
class Peak:
    words: str
    """The words that a device's name has, as the driver gives it."""
    tflops: float
    units: int
    """Streaming multiprocessors or compute units of the whole device; partitions have fewer."""


PEAKS = (
    Peak(words="h100 pcie", tflops=756, units=114),
    Peak(words="h100 nvl", tflops=835, units=132),
    Peak(words="h200 nvl", tflops=835, units=132),
    Peak(words="a100", tflops=312, units=108),
    Peak(words="h100", tflops=989, units=132),
    Peak(words="h200", tflops=989, units=132),
    Peak(words="gh200", tflops=989, units=132),
    Peak(words="b200", tflops=2250, units=148),
    Peak(words="l40s", tflops=362, units=142),
    Peak(words="l4", tflops=121, units=58),
    Peak(words="mi210", tflops=181, units=104),
    Peak(words="mi250", tflops=181, units=104),
    Peak(words="mi250x", tflops=191.5, units=110),
    Peak(words="mi300a", tflops=980.6, units=228),
    Peak(words="mi300x", tflops=1307.4, units=304),
    Peak(words="mi325x", tflops=1307.4, units=304),
    Peak(words="mi350x", tflops=2307, units=256),
    Peak(words="mi355x", tflops=2516, units=256),
)
"""The first whose words are all in a name counts. An MI250's or MI250X's are those of one die."""


def peak_tflops(name: str, units: int | None = None) -> float | None:
    """The peak of the device in TFLOP/s; None if it is not known.

    `units` are those that this device has: a partition has its share of the whole.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    for peak in PEAKS:
        if words.issuperset(peak.words.split()):
            share = 1.0 if units is None else min(1.0, units / peak.units)
            return peak.tflops * share
    return None


def peak_of(accelerator: "Accelerator") -> float | None:
    """The peak of this machine's device in TFLOP/s; None for a CPU, or if it is not known."""
    if accelerator.kind == "cpu":
        return None
    import torch

    units = torch.cuda.get_device_properties(accelerator.index).multi_processor_count
    return peak_tflops(accelerator.name, units)
