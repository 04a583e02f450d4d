"""Estimates training time from recorded measurements; unknown if there is no suitable one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "measurements"
"""A link to benchmarks/results; wheels hold copies of those files."""
SIZE_TOLERANCE = 0.1
"""Relative difference in parameter count up to which two models count as equally fast."""

BATCH_TOLERANCE = 0.2
"""The same for tokens per micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Tokens per second of a model on a device, at one size of micro-batch."""

    source: str
    """The file under benchmarks/results/, and what was measured."""
    device: str
    cores: int | None
    """Cores used, on a CPU; None for a GPU."""
    parameters: int
    batch_tokens: int
    slowest: float
    fastest: float
    """Tokens per second, of single steps if those were recorded."""
    method: str
    """`lora` or `full`."""
    compiled: bool
    """Whether `train.torch_compile` was on."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training whose time is estimated."""

    device: str
    cores: int | None = None
    """Cores, on a CPU; None for a GPU."""
    parameters: int
    method: str
    compiled: bool
    tokens: float
    """In all steps."""
    batch_tokens: float
    """In one micro-batch."""

    def resembles(self, measured: Measurement) -> bool:
        """Whether a measurement applies, ignoring the size of micro-batches.

        Of CPUs only the number of cores is compared; the source names the CPU measured.
        """
        return (
            measured.cores == self.cores
            and (self.cores is not None or same_device(measured.device, self.device))
            and (measured.method, measured.compiled) == (self.method, self.compiled)
            and abs(measured.parameters / self.parameters - 1) <= SIZE_TOLERANCE
        )


@dataclass(frozen=True, kw_only=True)
class TimeRange:
    """Seconds of training, at the speeds of the measurements nearest in size."""

    shortest: float
    longest: float
    beyond: bool
    """Whether the micro-batches are smaller or larger than any that was measured."""
    sources: tuple[str, ...]


def measurements(folder: Path = RESULTS) -> Iterator[Measurement]:
    """All results that record a speed."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for each in result.get("speeds", ()):
            cores = result.get("cores")
            where = f", on {result['device']} with {cores} cores" if cores else ""
            yield Measurement(
                source=f"{path.name}: {each['what']}{where}",
                device=result["device"],
                cores=cores,
                parameters=result["parameters"],
                batch_tokens=each["tokens_a_pass"],
                slowest=each.get("slowest", each["tokens_per_second"]),
                fastest=each.get("fastest", each["tokens_per_second"]),
                method=each["trained"],
                compiled=each.get("compiled", False),
            )


def training_time(known: Iterator[Measurement], training: Training) -> TimeRange | None:
    """Estimates the training time; None if no measurement applies."""
    similar = [each for each in known if training.resembles(each)]
    if not similar:
        return None
    # Speed grows with the tokens in a micro-batch: the nearest sizes on both sides bound it.
    wanted = training.batch_tokens
    below = [each for each in similar if each.batch_tokens <= wanted]
    above = [each for each in similar if each.batch_tokens > wanted]
    nearest = sorted(below, key=_batch_tokens)[-1:] + sorted(above, key=_batch_tokens)[:1]
    measured = len(nearest) == 2 or abs(wanted / nearest[0].batch_tokens - 1) <= BATCH_TOLERANCE
    return TimeRange(
        shortest=training.tokens / max(each.fastest for each in nearest),
        longest=training.tokens / min(each.slowest for each in nearest),
        beyond=not measured,
        sources=tuple(each.source for each in nearest),
    )


def _batch_tokens(measurement: Measurement) -> int:
    return measurement.batch_tokens


def same_device(measured: str, wanted: str) -> bool:
    """Whether two names mean the same model of GPU: `NVIDIA H200` and `h200`."""
    return set(wanted.lower().split()) <= set(measured.lower().replace(",", " ").split())
