"""Compares reinforcement with training on: both continue one adapter, for the same time.

    python -m benchmarks.reinforcement --work FOLDER

For each seed, `specs/latex.yaml` trains an adapter. `specs/latex-grpo.yaml` reinforces it, and the
training continues it on the same rows, for as many steps as take the same time. How long a step of
each takes is measured first, with all cores; then the runs share them, one thread each. Both keep
the step with the most exact matches on the same validation rows; the result is measured on other
rows. `benchmarks.reinforcement_curves` draws the curves.

Called again with the same FOLDER, a benchmark that was stopped goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks import record
from job.distributed.cores import cores
from job.engines import cpu
from tests.jobs import ROOT, sets

TRAINED, CONTINUED, REINFORCED = "trained", "continued", "reinforced"
HELD_OUT, VALIDATION = 1024, 512
"""Rows: to compare the adapters by, and to choose each run's best step by."""
VALIDATIONS = 8
TIMED_STEPS = {CONTINUED: 30, REINFORCED: 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407, 3408, 3409])
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the training on")
    parser.add_argument("--at-once", type=int, default=cores(), help="runs, of one thread each")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    arguments = parser.parse_args()
    comparison = Comparison(arguments.work.absolute(), arguments.learning_rate)
    seconds = comparison.seconds_a_step(arguments.seeds[0])
    ratio = seconds[REINFORCED] / seconds[CONTINUED]
    steps = round(comparison.reinforced_steps * ratio)
    with ThreadPoolExecutor(arguments.at_once) as pool:
        runs = list(pool.map(lambda seed: comparison.runs(seed, steps), arguments.seeds))
    means = {
        name: statistics.fmean(each[name]["exact_match"] for each in runs)
        for name in (TRAINED, CONTINUED, REINFORCED)
    }
    record.write(
        "reinforcement",
        "benchmarks.reinforcement",
        f"{cpu.model()}, {cores()} cores",
        {
            "seconds_per_step": {name: round(each, 3) for name, each in seconds.items()},
            "steps": {CONTINUED: steps, REINFORCED: comparison.reinforced_steps},
            "minutes": round(comparison.reinforced_steps * seconds[REINFORCED] / 60, 1),
            "continued_learning_rate": arguments.learning_rate,
            "held_out_rows": HELD_OUT,
            "validation_rows": VALIDATION,
            "mean_exact_match": {name: round(mean, 4) for name, mean in means.items()},
            "gain_over_continued": round(means[REINFORCED] - means[CONTINUED], 4),
            "seeds": dict(zip(map(str, arguments.seeds), runs, strict=True)),
        },
        ("torch", "transformers", "trl"),
        arguments.results,
    )


class Comparison:
    """The runs of all seeds, in a folder."""

    def __init__(self, work: Path, learning_rate: float) -> None:
        self._work, self._learning_rate = work, learning_rate
        self._reinforce = _spec("latex-grpo")["reinforce"]
        self.reinforced_steps = int(self._reinforce["max_steps"])

    def seconds_a_step(self, seed: int) -> dict[str, float]:
        """The mean of some steps of both ways, each alone on all cores, without validation."""
        stored = self._work / "seconds.json"
        if stored.exists():
            return dict(json.loads(stored.read_text()))
        adapter = self._trained(seed, threads=cores())
        found = {}
        for name, steps in TIMED_STEPS.items():
            output = self._work / f"timed-{name}"
            spec = _unvalidated(self._continuing(name, adapter, seed, steps))
            self._run(spec, output, threads=cores())
            stages = json.loads((output / "run.json").read_text())["stages"]
            stage = stages["reinforce" if name == REINFORCED else "train"]
            found[name] = stage["summary"]["seconds"] / steps
        stored.write_text(json.dumps(found))
        return found

    def runs(self, seed: int, steps: int) -> dict[str, Any]:
        """The three adapters of a seed, measured on the held-out rows, with their curves."""
        adapter = self._trained(seed, threads=1)
        found = {TRAINED: self._measured(adapter, seed, TRAINED)}
        for name, count in ((CONTINUED, steps), (REINFORCED, self.reinforced_steps)):
            output = self._work / f"{name}-{seed}"
            self._run(self._continuing(name, adapter, seed, count), output, threads=1)
            folder = output / "reinforced" if name == REINFORCED else output
            found[name] = self._measured(folder / "adapter", seed, name) | {
                "curve": _curve(output, name)
            }
        found[TRAINED]["curve"] = _curve(self._work / f"{TRAINED}-{seed}", TRAINED)
        return found

    def _trained(self, seed: int, *, threads: int) -> Path:
        output = self._work / f"{TRAINED}-{seed}"
        self._run(_validated(_spec("latex"), seed), output, threads=threads)
        return output / "adapter"

    def _continuing(self, name: str, adapter: Path, seed: int, steps: int) -> dict[str, Any]:
        """The spec that continues the adapter for these steps, by training or reinforcement."""
        spec = _validated(_spec("latex"), seed)
        spec["model"]["adapter_name_or_path"] = str(adapter)
        every = max(1, steps // VALIDATIONS)
        if name == CONTINUED:
            spec["train"] |= {
                "max_steps": steps,
                "learning_rate": self._learning_rate,
                "eval_steps": every,
            }
            return spec
        for key in ("eval_strategy", "eval_steps", "load_best_model_at_end", *BY_ANSWERS):
            spec["train"].pop(key)
        spec["train"]["max_steps"] = 0
        spec["reinforce"] = self._reinforce | {"max_steps": steps, "eval_steps": every}
        return spec

    def _measured(self, adapter: Path, seed: int, name: str) -> dict[str, Any]:
        """Metrics of an adapter on the held-out rows."""
        folder = self._work / f"measured-{name}-{seed}"
        metrics = folder / "eval" / "adapter.json"
        if not metrics.exists():
            settings = {"data.eval.limit": HELD_OUT, "eval.max_samples": HELD_OUT}
            _job("eval", "specs/latex.yaml", ["--adapter", adapter, "--to", folder], settings, 1)
        found = json.loads(metrics.read_text())["metrics"]
        return {key: round(found[key], 4) for key in ("loss", "exact_match", "cer")}

    def _run(self, spec: Mapping[str, Any], output: Path, *, threads: int) -> None:
        path = self._work / f"{output.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(spec)))
        _job("train", str(path), ["--output", output], {}, threads)


BY_ANSWERS = {"predict_with_generate": True, "metric_for_best_model": "exact_match"}


def _spec(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "specs" / f"{name}.yaml").read_text()))


def _validated(spec: dict[str, Any], seed: int) -> dict[str, Any]:
    """The spec with the seed, and with validation on more rows, by exact match."""
    spec["train"] |= {"seed": seed, **BY_ANSWERS}
    spec["data"]["validation"]["limit"] = VALIDATION
    spec["eval"]["validation_samples"] = VALIDATION
    return spec


def _unvalidated(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec without validation."""
    spec["data"].pop("validation")
    spec["eval"].pop("validation_samples")
    for section in (spec["train"], spec.get("reinforce", {})):
        for key in ("eval_strategy", "eval_steps", "load_best_model_at_end", *BY_ANSWERS):
            section.pop(key, None)
    return spec


def _job(
    command: str,
    spec: str,
    arguments: Sequence[object],
    settings: Mapping[str, object],
    threads: int,
) -> None:
    subprocess.run(  # noqa: S603
        [sys.executable, "-m", "job", command, spec, *map(str, arguments), *sets(settings)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
    )


def _logged(output: Path, name: str) -> list[dict[str, Any]]:
    folder = "reinforced" if name == REINFORCED else "train"
    lines = (output / folder / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _curve(output: Path, name: str) -> list[dict[str, float]]:
    """Of each validation: the step and the share of exact matches."""
    return [
        {"step": entry["step"], "exact_match": round(entry["eval_exact_match"], 4)}
        for entry in _logged(output, name)
        if "eval_exact_match" in entry
    ]


if __name__ == "__main__":
    main()
