"""How fast several processes train together, compared with as many independent ones, as measured.

The measurements are the results of `benchmarks/processes.py`: `processes-*.json`. Averaging
gradients with other processes, and waiting for them, takes time.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from job.errors import UsageError
from job.planning.speed import RESULTS, same_device
from job.spec.types import JobSpec

FILES = "processes-*.json"
DDP = re.compile(r"(\d+) processes, .* ddp(, compiled)?$")
"""The name of a run of several processes that hold the whole model each."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Processes with a device each, compared with one process that has the rows of one of them."""

    source: str
    device: str
    processes: int
    efficiency: float
    """Their speed divided by `processes` times that of the one; 1 loses nothing."""


def measured_scalings(folder: Path = RESULTS) -> Iterator[Scaling]:
    for path in sorted(folder.glob(FILES)):
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, compared in result["compared"].items():
            if (found := DDP.match(name)) and "speed_by_one" in compared:
                processes = int(found[1])
                yield Scaling(
                    source=f"{path.name}: {name}",
                    device=result["device"],
                    processes=processes,
                    efficiency=compared["speed_by_one"] / processes,
                )


def scaling_of(known: Iterable[Scaling], device: str, processes: int) -> Scaling | None:
    """The least efficient of those with the number of processes closest to this one; None if none
    was measured on such a device."""
    similar = [each for each in known if same_device(each.device, device)]

    def distance(each: Scaling) -> float:
        return max(each.processes / processes, processes / each.processes)

    return min(similar, key=lambda each: (distance(each), each.efficiency), default=None)


def require_possible(spec: JobSpec, processes: int) -> None:
    """Raises UsageError if the spec does not allow this number of processes."""
    kind = spec.runtime.distributed
    if processes > 1 and kind == "none":
        raise UsageError(
            "--processes",
            "is more than one, but runtime.distributed is none",
            value=processes,
            fix="set that to auto: --set runtime.distributed=auto; or plan for one",
        )
    if processes > 1 and spec.reinforce is not None:
        raise UsageError(
            "--processes",
            "is more than one, but reinforce runs in one process",
            value=processes,
            fix="plan for one; several can train before, without the section reinforce",
        )
    if processes == 1 and kind in ("ddp", "fsdp2"):
        raise UsageError(
            "--processes",
            f"is one, but runtime.distributed is {kind}, which needs several",
            value=processes,
            fix="plan for two at least, or set that to auto: --set runtime.distributed=auto",
        )
