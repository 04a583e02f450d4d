"""Estimates the time of each stage by rates fitted to measured jobs.

The measurements are the results of `benchmarks/reference_job.py`: `reference-*.json`, each with one
job or several. Rates are fitted by least squares of the relative errors over all jobs of a device
and a kind of model. A small weight pulls them to the rates of `stage_work.RATES`, so that one job
is enough; the fit still reproduces its stages.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from job.planning.speed import RESULTS, same_device
from job.planning.stage_work import RATES, STAGES, Work, stage_quantities

FILES = "reference-*.json"
SAME_MODEL = 0.15
"""Relative difference of the parameters per layer up to which models count as of one kind."""
PULL = 0.02
"""The weight of a rate's start value, relative to that of a measurement."""
ROUNDS = 10
LEAST_ERROR, ERROR_OF_ONE = 0.1, 0.2
"""The error of an estimate within what was measured: by three jobs at least, or by fewer."""
ERROR_BEYOND, BEYOND = 0.5, 2.0
"""The error if a stage's main quantity is more than this many times what was measured, or less."""


@dataclass(frozen=True, kw_only=True)
class MeasuredJob:
    """A job that was measured, on one device."""

    source: str
    """The file's name."""
    device: str
    cores: int | None
    """Cores used, on a CPU; None for a GPU."""
    work: Work
    seconds: Mapping[str, float]
    """Of each stage that ran, by its name."""


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    seconds: float
    error: float
    """Relative: 0.2 is a fifth, more or less."""


def measured_jobs(folder: Path = RESULTS) -> Iterator[MeasuredJob]:
    """The jobs of all results; those that did not end are left out."""
    for path in sorted(folder.glob(FILES)):
        result = json.loads(path.read_text(encoding="utf-8"))
        runs: Iterable[Mapping[str, Any]] = result.get("ladder", {"": result}).values()
        for run in runs:
            if run.get("complete") and "work" in run:
                yield MeasuredJob(
                    source=path.name,
                    device=result["device"],
                    cores=result.get("cores"),
                    work=_work(run["work"]),
                    seconds=stage_seconds(run),
                )


def stage_seconds(run: Mapping[str, Any]) -> dict[str, float]:
    """The seconds by stage of a result of `benchmarks/reference_job.py`."""
    measured = {name: stage["seconds"] for name, stage in run["stages"].items()}
    found = {"start": run["before_first_stage_seconds"]}
    found |= {stage: measured[stage] for stage in STAGES if stage in measured}
    # From one stage to the next, records are stored.
    found["finish"] = run["total_seconds"] - sum(found.values())
    return found


def _work(stored: Mapping[str, Any]) -> Work:
    return Work(**{each.name: stored[each.name] for each in fields(Work)})


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The rates of a device for a kind of model, and the jobs that they are fitted to."""

    jobs: tuple[MeasuredJob, ...]
    rates: Mapping[str, float]

    @classmethod
    def of(
        cls, known: Iterable[MeasuredJob], device: str, cores: int | None, work: Work
    ) -> "CostModel | None":
        """The model for this device and kind of model; None if no such job was measured.

        Of CPUs only the number of cores is compared: the sources name the CPU.
        """
        jobs = tuple(
            each
            for each in known
            if each.cores == cores
            and (cores is not None or same_device(each.device, device))
            and abs(_width(each.work) / _width(work) - 1) <= SAME_MODEL
            and (each.work.compiled or not work.compiled or cores is None)
            and each.work.four_bit == work.four_bit
        )
        return cls(jobs=jobs, rates=fit(jobs, on_gpu=cores is None)) if jobs else None

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(job.source for job in self.jobs))

    def estimate(self, work: Work, stages: Sequence[str]) -> dict[str, StageEstimate]:
        """The time of each of these stages, with its error."""
        return {
            stage: StageEstimate(
                seconds=self._seconds(quantities), error=self._error(stage, quantities)
            )
            for stage, quantities in stage_quantities(work, stages).items()
        }

    def _seconds(self, quantities: Mapping[str, float]) -> float:
        return sum(self.rates[name] * amount for name, amount in quantities.items())

    def _error(self, stage: str, quantities: Mapping[str, float]) -> float:
        """How far the fit is from the stage's measurements, or more if they are of other sizes."""
        of_stage = [
            (stage_quantities(job.work, tuple(job.seconds))[stage], job.seconds[stage])
            for job in self.jobs
            if stage in job.seconds
        ]
        main = max(quantities, key=lambda name: self.rates[name] * quantities[name])
        sizes = [known[main] for known, _ in of_stage if known.get(main)]
        wanted = quantities[main]
        if not sizes or not min(sizes) / BEYOND <= wanted <= max(sizes) * BEYOND:
            return ERROR_BEYOND
        off = [abs(self._seconds(known) / max(took, 1e-9) - 1) for known, took in of_stage]
        return round(max(LEAST_ERROR if len(off) >= 3 else ERROR_OF_ONE, *off), 2)


def _width(work: Work) -> float:
    return work.parameters / work.layers


def fit(jobs: Sequence[MeasuredJob], *, on_gpu: bool) -> dict[str, float]:
    """The rates that meet the measured stages best, none of them negative."""
    import numpy as np

    start = {name: rate.gpu if on_gpu else rate.cpu for name, rate in RATES.items()}
    names, rows = list(start), []
    for job in jobs:
        for stage, quantities in stage_quantities(job.work, tuple(job.seconds)).items():
            took = max(job.seconds[stage], 0.1)
            rows.append([quantities.get(name, 0.0) * start[name] / took for name in names])
    measured = np.array(rows)  # (stages of all jobs, rates), in multiples of the start values
    matrix = np.concatenate([measured, PULL * np.eye(len(names))])
    multiples = np.ones(len(names))
    # Each round is pulled to the one before, so that the fit also reaches devices whose rates are
    # far from the start values.
    for _ in range(ROUNDS):
        wanted = np.concatenate([np.ones(len(rows)), PULL * multiples])
        free = np.ones(len(names), dtype=bool)
        while True:
            solved, *_ = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)
            if solved.min() >= 0:
                break
            free[np.flatnonzero(free)[solved.argmin()]] = False
        multiples = np.zeros(len(names))
        multiples[free] = solved
    return {name: float(start[name] * each) for name, each in zip(names, multiples, strict=True)}
