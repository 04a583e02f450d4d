"""Measures the whole job as it ships, stage by stage, from process start to `_SUCCESS`.

    python -m benchmarks.reference_job                             a tiny base, on this CPU
    python -m benchmarks.reference_job --model 28b --base /dev/shm/base --data FORMULAS

The job is specs/ernie-4.5-vl-28b-latex.yaml, run by its command, with other URIs for the model, the
data and the output, and otherwise unchanged, except for what this machine lacks. The base has the
published architecture and layout with random weights; writing it is not counted, and it is kept
for the next run if `--base` names a folder. `--set` measures a variant; with
`--set model.load_in_4bit=true`, `--memory-limit 24` does so within the memory of a smaller GPU.
`--ladder` measures the train stage alone with 4, 16 and 92 rows a step, with and without routed
experts, and `--spec` another spec as it is. Each stage's result is printed and stored as soon as it
is known. `job plan` estimates times from the results (`job/planning/cost_model.py`).
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import record, reference_inputs, reference_work
from benchmarks.reference_run import ROOT, Run, Watched, measure
from job.distributed.cores import cores
from job.engines import cpu
from job.engines.device import EIGHT_BIT
from job.spec.load import load_spec

SPEC = "specs/ernie-4.5-vl-28b-latex.yaml"
LADDER = [(rows, experts) for experts in (True, False) for rows in (4, 16, 92)]
"""Rows a step, and whether routed experts are adapted."""
LADDER_STEPS = {4: 60, 16: 40, 92: 20}
LADDER_LIMIT = 240
"""Seconds for each."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the job, stores what is known
    with _folder(arguments.work) as work:
        settings = [f"runtime.cache_dir={work / 'cache'}"]
        paths = {str(work): "WORK"}
        facts: dict[str, Any] = {"spec": arguments.spec}
        if arguments.spec == SPEC:
            base = arguments.base or work / "base"
            _write_base(arguments, base)
            data = reference_inputs.write_data(
                work / "data", arguments.data, arguments.train_rows, arguments.eval_rows
            )
            settings.append(f"model.model_name_or_path={base}")
            settings += [f"data.{split}.uri={path}" for split, path in data.items()]
            paths = {str(base): "BASE", **paths}
            facts |= {
                "model": arguments.model,
                "base_gib": _gib(base),
                "data": "im2latex" if arguments.data else "noise",
            }
        forced = _forced(arguments)
        output = work / "output"
        given = (*settings, *forced, *arguments.set)
        planned = reference_work.planned(arguments.spec, (*given, f"output.uri={output}")) or {}
        if arguments.memory_limit is not None:
            facts["memory_limit_gib"] = arguments.memory_limit
        facts |= {"settings": arguments.set, "settings_forced": forced, "planned": planned}
        run = Run(
            command="run",
            spec=arguments.spec,
            settings=given,
            output=output,
            limit=arguments.limit,
            planned=planned.get("work"),
            memory_limit=arguments.memory_limit,
            hidden=paths,
        )
        if arguments.ladder:
            _climb(arguments, run, facts)
            return
        name = arguments.name or f"reference-job-{_place(arguments)}"
        measure(run, lambda watched: _write(arguments, name, {**facts, **watched.to_json()}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default=SPEC, help="another spec, which is run as it is")
    parser.add_argument("--model", choices=("tiny", "28b"), default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model's")
    parser.add_argument("--base", type=Path, help="folder of the base; written if it is missing")
    parser.add_argument("--data", type=Path, help="folder of im2latex lists; default: noise")
    parser.add_argument("--train-rows", type=int, default=reference_inputs.TRAIN_ROWS)
    parser.add_argument("--eval-rows", type=int, default=reference_inputs.EVAL_ROWS)
    parser.add_argument("--work", type=Path, help="folder for data, caches and outputs; kept")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the job"
    )
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a job ends")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="of a smaller GPU, for the job's process"
    )
    parser.add_argument("--ladder", action="store_true", help="measure the train stage alone")
    parser.add_argument("--rows", type=int, nargs="+", help="of the ladder, these rows a step")
    parser.add_argument("--name", help="of the result's file, without .json")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder to write to")
    return parser.parse_args()


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    """The given folder, without the output of an earlier run, or a temporary one."""
    if work is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    for old in ("output", "cache", "data"):
        shutil.rmtree(work / old, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    yield work.resolve()


def _write_base(arguments: argparse.Namespace, base: Path) -> None:
    if (base / "config.json").is_file():
        return
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.reference_inputs", str(base)]
    command += ["--model", arguments.model]
    command += ["--layers", str(arguments.layers)] if arguments.layers else []
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603
    print(f"base: {_gib(base)} GiB in {time.monotonic() - started:.1f} s", flush=True)


def _forced(arguments: argparse.Namespace) -> list[str]:
    """Settings for what this machine lacks: 8-bit optimizers without a GPU or bitsandbytes."""
    from importlib.util import find_spec

    text = (ROOT / arguments.spec).read_text()
    spec = load_spec(text, arguments.spec, arguments.set, environ={}).spec
    on_gpu = gpu_name() is not None
    if spec.train.optim in EIGHT_BIT and not (on_gpu and find_spec("bitsandbytes")):
        return [f"train.optim={'adamw_torch_fused' if on_gpu else 'adamw_torch'}"]
    return []


def gpu_name() -> str | None:
    """The first GPU's name, asked without a context on it, which would take memory."""
    import torch

    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "GPU"
    return found.stdout.splitlines()[0].strip()


def place(gpu: str | None) -> str:
    """The device in the name of a result: `h200`, or `cpu` without a GPU."""
    return "cpu" if gpu is None else gpu.split()[-1].lower()


def _place(arguments: argparse.Namespace) -> str:
    what = arguments.model if arguments.spec == SPEC else Path(arguments.spec).stem
    return f"{what}-{place(gpu_name())}"


def _gib(folder: Path) -> float:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return round(total / 2**30, 3)


def _climb(arguments: argparse.Namespace, shipped: Run, facts: dict[str, Any]) -> None:
    """The train stage with more and more rows a step, with and without routed experts."""
    name = arguments.name or f"reference-ladder-{_place(arguments)}"
    steps: dict[str, Any] = {}
    for rows, experts in LADDER:
        if arguments.rows and rows not in arguments.rows:
            continue
        count = LADDER_STEPS[rows]
        variant = (
            f"train.per_device_train_batch_size={rows}",
            "train.gradient_accumulation_steps=1",
            f"lora.finetune_experts={str(experts).lower()}",
            f"train.max_steps={count}",
            f"train.save_steps={count}",
        )
        shutil.rmtree(shipped.output, ignore_errors=True)
        run = replace(
            shipped,
            command="train",
            settings=(*shipped.settings, *variant),
            limit=min(arguments.limit, LADDER_LIMIT),
        )
        key = f"{rows} rows, routed experts {'adapted' if experts else 'frozen'}"
        print(key, flush=True)

        def write(watched: Watched, key: str = key) -> None:
            steps[key] = watched.to_json()
            _write(arguments, name, {**facts, "ladder": steps})

        measure(run, write)


def _write(arguments: argparse.Namespace, name: str, result: dict[str, Any]) -> None:
    device = gpu_name()
    machine = {} if device else {"cores": cores()}
    record.write(
        name,
        "benchmarks.reference_job",
        device or cpu.model(),
        {**machine, **result},
        PACKAGES,
        arguments.results,
    )


if __name__ == "__main__":
    os.environ.pop("BUCKET", None)  # the spec's own defaults
    os.environ.pop("MAX_STEPS", None)
    main()
