"""Step time with checkpoints uploaded in the background, in the foreground, and not at all.

Full fine-tuning of the tiny model on one core, with a checkpoint of 66 MiB every ten steps to an S3
server on loopback. As with a GPU, the other cores are free for uploads and the server. Run from the
repository:

    python -m benchmarks.checkpoint_uploads

writes benchmarks/results/checkpoint-uploads.json.
"""

import itertools
import json
import os
import platform
import statistics
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it

from benchmarks import record
from job import storage
from job.cli.app import app
from job.train.checkpoint.uploads import BackgroundUploads
from tests.jobs import FULL, ROOT, UNVALIDATED, sets
from tests.s3 import S3Server

STEPS, EVERY, SKIPPED, TURNS = 63, 10, 2, 3
in_background = BackgroundUploads.submit


def in_foreground(self: BackgroundUploads, step: int, store, *, urgent: bool = False) -> None:  # type: ignore[no-untyped-def]
    """Uploads synchronously: training waits."""
    in_background(self, step, store, urgent=urgent)
    self.finish()


def seconds_a_step(output: str, cache: str, every: int) -> tuple[float, float]:
    """Mean and maximum step time of a training, without its first steps."""
    settings = {
        **FULL,
        **UNVALIDATED,
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
    """Minimum, median and maximum of several runs."""
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    load = os.getloadavg()[0]
    ways = {"none": (in_background, 10**6), "background": (in_background, EVERY)}
    ways["foreground"] = (in_foreground, EVERY)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with S3Server() as server, tempfile.TemporaryDirectory() as folder:
        os.environ.update(server.environ)
        for turn in range(TURNS):  # interleaved, so that other load affects all equally
            for name, (submit, every) in ways.items():
                BackgroundUploads.submit = submit  # type: ignore[method-assign]
                output = f"s3://benchmark/{name}-{turn}"
                found[name].append(seconds_a_step(output, f"{folder}/{name}-{turn}", every))
    steps = {name: [mean for mean, _ in runs] for name, runs in found.items()}
    result = {
        "seconds_per_step": {name: spread(means) for name, means in steps.items()},
        "longest_step_seconds": {
            name: spread([longest for _, longest in runs]) for name, runs in found.items()
        },
        # Compared within a round, so that the machine's drift between rounds cancels out.
        "ratio_to_no_uploads": {
            name: spread([a / b for a, b in zip(means, steps["none"], strict=True)])
            for name, means in steps.items()
            if name != "none"
        },
        "steps": STEPS,
        "steps_between_checkpoints": EVERY,
        "runs_each": TURNS,
        "load_average_before": round(load, 2),
    }
    record.write(
        "checkpoint-uploads",
        "benchmarks.checkpoint_uploads",
        f"{platform.machine()} CPU, one of {os.cpu_count()} cores; store on the others",
        result,
        ("torch", "transformers", "s3fs"),
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
