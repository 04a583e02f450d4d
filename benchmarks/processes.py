"""Measures the train stage on several GPUs against one: speed, losses and memory.

    python -m benchmarks.processes --base /dev/shm/base --data FORMULAS     two GPUs
    python -m benchmarks.processes --base FOLDER --processes 2 --set train.optim=adamw_torch

Every run is `job train` of specs/ernie-4.5-vl-28b-latex.yaml, as a user starts it. `--base` is a
folder that `benchmarks.reference_inputs` has written. One process trains the rows of one GPU, and
the rows of all; several train them together by DDP, and by FSDP2, which can train all weights too:
on two GPUs, of a base with at most 16 layers. Runs that do not need all GPUs have some of their
own, side by side: 1, 2, 4, … processes, fewer than `--processes`. Each result is stored as soon as
it is known.
"""

import argparse
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks import record, reference_inputs
from benchmarks.reference_job import SPEC, gpu_name, place
from benchmarks.reference_run import Run, measure
from job.engines import cpu

PACKAGES = ("torch", "transformers", "peft", "accelerate")
SPEED = "steady_tokens_per_second"


@dataclass(frozen=True, kw_only=True)
class Variant:
    processes: int
    rows: int
    """Of each process in a step."""
    kind: str = "ddp"
    compiled: bool = False
    full: bool = False
    """Trains all weights, not an adapter."""

    def __str__(self) -> str:
        shared = f", {self.kind}" if self.processes > 1 else ""
        shared += ", all weights" if self.full else ""
        each = " each" if self.processes > 1 else ""
        compiled = ", compiled" if self.compiled else ""
        plural = "es" if self.processes > 1 else ""
        return f"{self.processes} process{plural}, {self.rows} rows{each}{shared}{compiled}"

    def settings(self, steps: int) -> list[str]:
        settings = {
            "train.per_device_train_batch_size": self.rows,
            "train.gradient_accumulation_steps": 1,
            "train.max_steps": steps,
            "train.save_steps": steps,
            "train.logging_steps": 1,
            **(
                {"train.optim": "auto"}  # 8-bit optimizers do not update sharded weights
                if self.kind == "fsdp2"
                else {"train.torch_compile": self.compiled}
            ),
            **({"lora": {"method": "full"}, "model.dtype": "auto"} if self.full else {}),
            **({"runtime.distributed": self.kind} if self.processes > 1 else {}),
        }
        return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def variants(processes: int) -> list[list[Variant]]:
    """Those of a list run side by side, each on GPUs of its own. In order of interest."""
    whole = Variant(processes=1, rows=4 * processes)
    counts = [2**n for n in range(processes.bit_length() - 1)]  # 1, 2, 4, …
    return [
        [*(Variant(processes=count, rows=4) for count in counts), whole],
        [Variant(processes=processes, rows=4)],
        [Variant(processes=processes, rows=4, kind="fsdp2")],
        [Variant(processes=1, rows=16, compiled=True)],
        [Variant(processes=processes, rows=16, compiled=True)],
        [Variant(processes=processes, rows=4, kind="fsdp2", full=True)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base checkpoint")
    parser.add_argument("--data", type=Path, help="folder of im2latex lists; default: noise")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the groups to measure")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--limit", type=float, default=240, help="seconds of each run")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(arguments, Path(folder))
        for number, group in enumerate(variants(arguments.processes)):
            if arguments.only and number not in arguments.only:
                continue
            first_gpus = accumulate((variant.processes for variant in group), initial=0)
            with ThreadPoolExecutor(len(group)) as pool:
                list(pool.map(benchmark.measure, group, first_gpus))


class Benchmark:
    """Runs of one base and the same rows, and what is known of them."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self._arguments = arguments
        self._work = work
        data = reference_inputs.write_data(
            work / "data", arguments.data, reference_inputs.TRAIN_ROWS, reference_inputs.EVAL_ROWS
        )
        self._settings = [f"data.{split}.uri={path}" for split, path in data.items()]
        self._settings += [f"model.model_name_or_path={arguments.base}", *arguments.set]
        config = json.loads((arguments.base / "config.json").read_text())
        self._layers: int = config["num_hidden_layers"]
        self._gpu = gpu_name()
        self._runs: dict[Variant, dict[str, Any]] = {}

    def measure(self, variant: Variant, first_gpu: int) -> None:
        """Trains it on as many GPUs as it has processes, from that one on."""
        output = self._work / str(variant).replace(" ", "-").replace(",", "")
        output.mkdir()
        run = Run(
            command="train",
            spec=SPEC,
            settings=[
                *self._settings,
                f"runtime.cache_dir={self._work / f'cache-{first_gpu}'}",
                *variant.settings(self._arguments.steps),
            ],
            output=output / "output",
            limit=self._arguments.limit,
            planned=None,
            hidden={str(self._arguments.base): "BASE", str(self._work): "WORK"},
            processes=variant.processes,
            gpus=None if self._gpu is None else range(first_gpu, first_gpu + variant.processes),
        )
        print(variant, flush=True)
        watched = measure(run, lambda _: None)
        history = run.output / "train" / "history.jsonl"
        lines = history.read_text().splitlines() if history.is_file() else []
        losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
        self._runs[variant] = {**watched.to_json(), "losses": losses}
        self._write()

    def _write(self) -> None:
        count = self._arguments.processes
        runs = {str(variant): run for variant, run in self._runs.items()}
        record.write(
            f"processes-{count}-{place(self._gpu)}",
            "benchmarks.processes",
            self._gpu or cpu.model(),
            {
                "processes": count,
                "layers": self._layers,
                "runs": runs,
                "compared": self._compared(),
            },
            PACKAGES,
            self._arguments.results,
        )

    def _compared(self) -> dict[str, dict[str, float]]:
        """By run of several processes: its speed by that of one with the same rows a process, and
        how far its losses are from those of one with the same rows a step."""
        compared: dict[str, dict[str, float]] = {}
        for variant, run in self._runs.items():
            if variant.processes == 1 or not run["complete"]:
                continue
            found = compared.setdefault(str(variant), {})
            one = replace(variant, processes=1, kind="ddp")
            if alone := self._runs.get(one, {}).get("training"):
                ratio = run["training"][SPEED] / alone[SPEED]
                found["speed_by_one"] = round(ratio, 3)
            if whole := self._runs.get(replace(one, rows=variant.rows * variant.processes)):
                pairs = zip(run["losses"], whole["losses"], strict=False)
                found["losses_off"] = round(max(abs(a / b - 1) for a, b in pairs), 5)
        return compared


if __name__ == "__main__":
    for name in ("BUCKET", "MAX_STEPS"):  # the spec's own defaults
        os.environ.pop(name, None)
    main()
