"""How long training will take, from measurements alone: what nobody has measured is not guessed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import job

RESULTS = Path(job.__file__).parent.parent / "benchmarks" / "results"
SAME_SIZE = 0.1
"""How far two models' numbers of parameters may differ for one's speed to stand for the other's."""

SAME_PASS = 0.2
"""The same for the tokens in a pass."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Tokens a second of a model on a device, with so many tokens in a pass."""

    source: str
    """The file under benchmarks/results/, with what was measured."""
    device: str
    cores: int | None
    """Of a CPU, as many as computed; None of a GPU."""
    parameters: int
    tokens_a_pass: int
    slowest: float
    fastest: float
    """Tokens a second, of single steps where those were written down."""
    trained: str
    """`lora` or `full`."""
    compiled: bool
    """Whether `train.torch_compile` was on."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of training alone, between the speeds of the measurements nearest in size."""

    shortest: float
    longest: float
    beyond: bool
    """Whether the job's passes are smaller or larger than any that was measured."""
    sources: tuple[str, ...]


def measurements(folder: Path = RESULTS) -> Iterator[Measurement]:
    """Every result that says of which model, method and size of pass its speed is."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for each in found.get("speeds", ()):
            cores = found.get("cores")
            where = f", on {found['device']} with {cores} cores" if cores else ""
            yield Measurement(
                source=f"{path.name}: {each['what']}{where}",
                device=found["device"],
                cores=cores,
                parameters=found["parameters"],
                tokens_a_pass=each["tokens_a_pass"],
                slowest=each.get("slowest", each["tokens_per_second"]),
                fastest=each.get("fastest", each["tokens_per_second"]),
                trained=each["trained"],
                compiled=each.get("compiled", False),
            )


def training_time(
    known: Iterator[Measurement],
    *,
    device: str,
    cores: int | None = None,
    parameters: int,
    trained: str,
    compiled: bool,
    tokens: float,
    tokens_a_pass: float,
) -> Time | None:
    """The time for so many tokens on the GPU of that name, or on a CPU of so many `cores`.

    None without a measurement. A CPU's model does not decide: the source names the one measured.
    """
    alike = [
        each
        for each in known
        if each.cores == cores
        and (cores is not None or _same_device(each.device, device))
        and (each.trained, each.compiled) == (trained, compiled)
        and abs(each.parameters / parameters - 1) <= SAME_SIZE
    ]
    if not alike:
        return None
    # Speed grows with the tokens in a pass: the neighbours on both sides bound it.
    below = [each for each in alike if each.tokens_a_pass <= tokens_a_pass]
    above = [each for each in alike if each.tokens_a_pass > tokens_a_pass]
    nearest = sorted(below, key=_size)[-1:] + sorted(above, key=_size)[:1]
    return Time(
        shortest=tokens / max(each.fastest for each in nearest),
        longest=tokens / min(each.slowest for each in nearest),
        beyond=len(nearest) == 1 and not _alike(nearest[0].tokens_a_pass, tokens_a_pass),
        sources=tuple(each.source for each in nearest),
    )


def _alike(measured: float, wanted: float) -> bool:
    """Whether passes are of one size, as far as speed can tell."""
    return abs(wanted / measured - 1) <= SAME_PASS


def _size(measurement: Measurement) -> int:
    return measurement.tokens_a_pass


def _same_device(measured: str, wanted: str) -> bool:
    """Whether names mean one model of GPU: `NVIDIA H200` and `h200`."""
    return set(wanted.lower().split()) <= set(measured.lower().replace(",", " ").split())
