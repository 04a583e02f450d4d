"""The step time with checkpoints uploaded in the background, in the foreground, and not at all.

Full fine-tuning of the tiny model on one core, with a checkpoint of 66 MiB every ten steps to an S3
server on loopback. The other cores are left to the uploads and the server, as beside a GPU. Run
from the repository:

    python benchmarks/checkpoint_uploads.py

writes benchmarks/results/checkpoint-uploads.json.
"""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there to read it

from job import storage  # noqa: E402
from job.cli import app  # noqa: E402
from job.train.uploads import BackgroundUploads  # noqa: E402
from tests.jobs import FULL, sets  # noqa: E402
from tests.s3 import S3Server  # noqa: E402

STEPS, EVERY, SKIPPED, TURNS = 63, 10, 2, 3
in_background = BackgroundUploads.submit


def in_foreground(self: BackgroundUploads, step: int, store, *, urgent: bool = False) -> None:  # type: ignore[no-untyped-def]
    """What training would wait for without the thread."""
    in_background(self, step, store, urgent=urgent)
    self.finish()


def seconds_a_step(output: str, cache: str, every: int) -> tuple[float, float]:
    """The mean and the largest step time of a training, its first steps left out."""
    settings = {
        **FULL,
        "data.train.limit": 400,
        "train.max_steps": STEPS,
        "train.save_steps": every,
        "runtime.cache_dir": cache,
    }
    spec = str(ROOT / "specs" / "latex.yaml")
    app(["train", spec, "--output", output, *sets(settings)], standalone_mode=False)
    lines = storage.read_text(storage.join(output, "train/history.jsonl")).splitlines()
    ended = [json.loads(line)["seconds"] for line in lines][SKIPPED:-1]
    steps = [b - a for a, b in itertools.pairwise(ended)]
    return statistics.mean(steps), max(steps)


def spread(values: list[float]) -> dict[str, float]:
    """The least, the middle and the most of several runs."""
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    load = os.getloadavg()[0]
    ways = {"none": (in_background, 10**6), "background": (in_background, EVERY)}
    ways["foreground"] = (in_foreground, EVERY)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with S3Server() as server, tempfile.TemporaryDirectory() as place:
        os.environ.update(server.environ)
        for turn in range(TURNS):  # in turns, so that other work on the machine meets all alike
            for name, (submit, every) in ways.items():
                BackgroundUploads.submit = submit  # type: ignore[method-assign]
                output = f"s3://benchmark/{name}-{turn}"
                found[name].append(seconds_a_step(output, f"{place}/{name}-{turn}", every))
    steps = {name: [mean for mean, _ in runs] for name, runs in found.items()}
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    result = {
        "name": "checkpoint-uploads",
        "device": f"{platform.machine()} CPU, one of {os.cpu_count()} cores; store on the others",
        "seconds_per_step": {name: spread(means) for name, means in steps.items()},
        "longest_step_seconds": {
            name: spread([longest for _, longest in runs]) for name, runs in found.items()
        },
        # Pair by pair within a turn, so that the machine's drift between turns is in neither.
        "ratio_to_no_uploads": {
            name: spread([a / b for a, b in zip(means, steps["none"], strict=True)])
            for name, means in steps.items()
            if name != "none"
        },
        "steps": STEPS,
        "steps_between_checkpoints": EVERY,
        "runs_each": TURNS,
        "load_average_before": round(load, 2),
        "command": "python benchmarks/checkpoint_uploads.py",
        "versions": {name: version(name) for name in ("torch", "transformers", "s3fs")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "source_revision": git.stdout.strip(),
    }
    path = ROOT / "benchmarks" / "results" / "checkpoint-uploads.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
