"""How much a training computes per second: TFLOP/s, and their share of the device's peak (MFU)."""

from dataclasses import dataclass
from itertools import islice

from job.distributed import process_group
from job.engines.device import Accelerator
from job.engines.peak_flops import peak_of
from job.families.step_flops import training_flops
from job.train.adapting import AdaptedModel
from job.train.train_context import TrainContext
from job.train.training_rows import TrainingRows, encode_truncated

MAX_ROWS = 64
"""Rows, spread over all, whose sizes are representative enough: 64 formulas give it within 2%."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Converts tokens per second, of all processes, to what each device computes."""

    flops_per_token: float
    """Of forward and backward pass, a mean over the training rows."""
    devices: int
    peak_tflops: float | None
    """Of one device, in the dtype of the training; None if unknown."""

    def tflops(self, tokens_per_second: float) -> float:
        """TFLOP/s of each device."""
        return round(tokens_per_second * self.flops_per_token / self.devices / 1e12, 3)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilization: the same as a share of the peak, 0 to 1."""
        if self.peak_tflops is None:
            return None
        return round(self.tflops(tokens_per_second) / self.peak_tflops, 4)


def shown_throughput(tflops: float | None, mfu: float | None) -> dict[str, float]:
    """Fields of a log line; none for what is not known."""
    known = {"tflops": tflops, "mfu": mfu}
    return {name: value for name, value in known.items() if value is not None}


def throughput(
    context: TrainContext, rows: TrainingRows, adapted: AdaptedModel
) -> Throughput | None:
    """The training's; None on a CPU, whose peak is not known and whose steps are not compared."""
    if context.accelerator.kind == "cpu":
        return None
    kept = rows.filtered.indices
    sample = islice(kept, 0, None, -(-len(kept) // MAX_ROWS))
    encoded = (
        encode_truncated(rows.measured[row], family=context.family, spec=context.spec)
        for row in sample
    )
    sizes = [context.family.row_size(row) for row in encoded if row is not None]
    forward = context.family.forward_flops(adapted.base, sizes)
    groups = None if context.spec.lora.method == "full" else adapted.targets
    return Throughput(
        flops_per_token=training_flops(forward, groups) / sum(size.tokens for size in sizes),
        devices=process_group.size(),
        peak_tflops=_peak(context, context.accelerator),
    )


def _peak(context: TrainContext, accelerator: Accelerator) -> float | None:
    """None for fp32, whose peak is another."""
    engine = context.engine
    halved = engine.autocast or engine.dtype.itemsize == 2
    return peak_of(accelerator) if halved else None
