"""Records what a finished run of a shipped spec gave: metrics, losses, checks, time and memory.

README and docs/19-receipts.md show these figures. CPU time, unlike the time on the clock, hardly
depends on what else the machine does; `--idle` says that it did nothing else:

    /usr/bin/time -v -o run.time python -m job run specs/latex.yaml -o outputs/latex
    python -m benchmarks.finished_run outputs/latex --time run.time
"""

import argparse
import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import record

STEPS = (10, 30, 60, 100, 150, 200)
"""Steps whose training loss is stored, if the run logged them; the last one always is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of a finished run")
    parser.add_argument("--time", type=Path, nargs="*", help="what `time -v` wrote about the job")
    parser.add_argument("--idle", action="store_true", help="give the minutes on the clock too")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    arguments = parser.parse_args()
    run = json.loads((arguments.output / "run.json").read_text())
    if run["status"] != "succeeded":
        parser.error(f"the run has {run['status']}")
    record.write(
        f"job-{run['name']}-cpu",
        "benchmarks.finished_run",
        f"{platform.machine()} CPU, {os.cpu_count()} cores",
        {
            "spec": f"specs/{run['name']}.yaml",
            "run_source_revision": run["versions"]["source_revision"],
            **of_run(run, arguments.output),
            **(of_clock(run) if arguments.idle else {}),
            **(of_time([file.read_text() for file in arguments.time]) if arguments.time else {}),
        },
        ("torch", "transformers", "peft"),
        arguments.results,
    )


def of_run(run: dict[str, Any], output: Path) -> dict[str, Any]:
    """Metrics before and after, losses by step, and what the export's checks found."""
    lines = (output / "train" / "history.jsonl").read_text().splitlines()
    losses = {e["step"]: e["loss"] for e in map(json.loads, lines) if "loss" in e}
    export = json.loads((output / "merged" / "export.json").read_text())
    final = json.loads((output / "eval" / "final.json").read_text())
    kept = ("tensors", "tensors_checked", "adapted_tensors", "changed_tensors", "merged_reloaded")
    return {
        "rows": run["rows"],
        "metrics": run["metrics"],
        "fields": final.get("fields", []),
        "steps": max(losses),
        "losses": {step: losses[step] for step in losses if step in (*STEPS, max(losses))},
        "validation": run["stages"]["train"]["summary"].get("validation"),
        "export": {key: export[key] for key in kept},
    }


def of_clock(run: dict[str, Any]) -> dict[str, float]:
    """Minutes on the clock, of the run and of its training."""
    started, finished = (datetime.fromisoformat(run[key]) for key in ("started", "finished"))
    return {
        "minutes": round((finished - started).total_seconds() / 60, 1),
        "train_minutes": round(run["stages"]["train"]["seconds"] / 60, 1),
    }


def of_time(reports: Sequence[str]) -> dict[str, float]:
    """CPU seconds of all starts of the job, and GiB at the peak, of what GNU time reported."""
    text = "".join(reports)
    seconds = sum(map(float, re.findall(r"(?:User|System) time \(seconds\): ([\d.]+)", text)))
    kib = max(map(int, re.findall(r"Maximum resident set size \(kbytes\): (\d+)", text)))
    return {"cpu_seconds": round(seconds), "peak_gib": round(kib / 2**20, 2)}


if __name__ == "__main__":
    main()
