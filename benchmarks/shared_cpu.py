"""The step time of a job alone and of two jobs at once on the same cores, by how threads wait.

The training of `specs/latex.yaml`. The settings take turns, so that other work on the machine slows
down all of them. A job alone has real-time priority where that is allowed, as if the machine had no
other work. Run from the repository:

    python -m benchmarks.shared_cpu

writes benchmarks/results/shared-cpu.json.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from benchmarks import record
from job.distributed.cores import THREADS, WAITING, cores
from job.engines import cpu
from tests.jobs import ROOT, UNVALIDATED, sets

STEPS, SKIPPED, TURNS = 10, 2, 2
SETTINGS = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "as shipped": {},
    "never spinning": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def command(name: str, output: Path, cache: Path) -> list[str]:
    settings = {
        **UNVALIDATED,
        "data.train.limit": 32 * STEPS,
        "train.max_steps": STEPS,
        "train.logging_steps": 1,
        "runtime.cache_dir": cache,
    }
    spec = str(ROOT / "specs" / "latex.yaml")
    return [sys.executable, "-m", "job", name, spec, "--output", str(output), *sets(settings)]


def alone() -> None:
    """Gives this process all that it wants of the machine, if it may ask for that."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def seconds_a_step(environ: dict[str, str], jobs: int) -> float:
    """The median of the steps of so many jobs at once."""
    unset = {key: text for key, text in os.environ.items() if key not in (*THREADS, *WAITING)}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"{number}") for number in range(jobs)]
        running = [
            subprocess.Popen(  # noqa: S603
                command("train", output, Path(folder, "cache")),
                env={**unset, **environ},
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=alone if jobs == 1 else None,
            )
            for output in outputs
        ]
        for process in running:
            _, said = process.communicate()
            if process.returncode:
                raise RuntimeError(said)
        steps = []
        for output in outputs:
            lines = (output / "train" / "history.jsonl").read_text().splitlines()
            ended = [json.loads(line)["seconds"] for line in lines][SKIPPED:]
            steps += [after - before for before, after in itertools.pairwise(ended)]
    return statistics.median(steps)


def main() -> None:
    """Measures all settings in turns and writes the results."""
    load = os.getloadavg()[0]
    found: dict[str, dict[str, list[float]]] = {
        name: {"alone": [], "two at once": []} for name in SETTINGS
    }
    for _ in range(TURNS):
        for name, environ in SETTINGS.items():
            for jobs, measured in enumerate(found[name].values(), start=1):
                measured.append(round(seconds_a_step(environ, jobs), 3))
                print(f"{name}, {jobs}: {measured[-1]} s a step", flush=True)
    results = {
        name: {key: {"runs": runs, "best": min(runs)} for key, runs in each.items()}
        for name, each in found.items()
    }
    record.write(
        "shared-cpu",
        "benchmarks.shared_cpu",
        f"{cpu.model()}, {cores()} cores",
        {"seconds_per_step": results, "steps": STEPS, "load_average_before": round(load, 2)},
        ("torch", "transformers"),
    )


if __name__ == "__main__":
    main()
