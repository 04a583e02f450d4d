"""Runs a job as a user does, and watches it from outside: its log, its record, the GPU's memory."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import reference_work

ROOT = Path(__file__).parents[1]
STAGE = re.compile(r"^\d\d:\d\d:\d\d INFO (\w+): (started|done)")
EVENT = re.compile(r"^\d\d:\d\d:\d\d [A-Z]+ ")
PROGRESS = re.compile(r"^\d\d:\d\d:\d\d INFO (train step=|.*\bdone=\d+/\d+ rate=)")
"""Lines that come again and again; none of these is stored."""
MAX_LINES, MAX_WIDTH = 120, 300
LOG = "job.log"
"""The whole log, beside the output."""
LONG = ("lora_targets", "details", "notes")
"""Parts of the stages' summaries that are not stored."""
GRACE = 40
"""Seconds that a job has to stop in once its time is over."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of the job."""

    command: str
    spec: str
    settings: Sequence[str]
    output: Path
    limit: float
    """Seconds after which it is stopped."""
    planned: Mapping[str, Any] | None
    """The quantities of the job, as planned; None if there is no plan."""
    memory_limit: float | None = None
    """GiB that it may allocate on a GPU; None for all."""
    processes: int = 1
    gpus: Sequence[int] | None = None
    """Indices of the GPUs that it sees; None for those that this process sees."""
    hidden: Mapping[str, str]
    """Names for this machine's paths in what is stored."""


@dataclass(kw_only=True)
class Watched:
    """What is known of a run so far."""

    run: Run
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    """By stage: when it started and how long it took, in seconds by this process's clock."""
    lines: list[str] = field(default_factory=list)
    """The log, with the seconds since the process started, without progress."""
    total: float | None = None
    exit_code: int | None = None
    device_memory: dict[str, int] = field(default_factory=dict)
    """By stage, in MiB: the most memory of a GPU in use."""
    utilization: dict[str, list[int]] = field(default_factory=dict)
    """By stage: how busy each GPU was each second, in percent."""
    current: str = "before"
    """The stage that runs."""

    def add(self, line: str, at: float) -> bool:
        """Takes in a line of the log; returns whether it ends a stage."""
        if EVENT.match(line) and not PROGRESS.match(line):
            self.lines.append(self.hide(f"{at:.1f} {line.rstrip()[9:]}")[:MAX_WIDTH])
        if (found := STAGE.match(line)) is None:
            return False
        stage, event = found.groups()
        if event == "started":
            self.current = stage
            self.stages[stage] = {"started": round(at, 2)}
            return False
        took = self.stages[stage]
        took["seconds"] = round(at - took["started"], 2)
        print(f"{stage}: {took['seconds']} s, ended at {at:.1f} s", flush=True)
        return True

    def to_json(self) -> dict[str, Any]:
        succeeded = (self.run.output / "_SUCCESS").exists() or self.run.command != "run"
        return {
            "complete": self.exit_code == 0 and succeeded,
            "exit_code": self.exit_code,
            "total_seconds": self.total,
            "before_first_stage_seconds": self._before(),
            "stages": {name: self._stage(name, took) for name, took in self.stages.items()},
            "after_last_stage_seconds": self._after(),
            **self._record(),
            "log": self.lines[:MAX_LINES],
        }

    def _before(self) -> float | None:
        return next((stage["started"] for stage in self.stages.values()), None)

    def _after(self) -> float | None:
        ends = [s["started"] + s["seconds"] for s in self.stages.values() if "seconds" in s]
        return round(self.total - max(ends), 2) if self.total is not None and ends else None

    def _stage(self, name: str, clock: Mapping[str, float]) -> dict[str, Any]:
        used = self.utilization.get(name)
        return {
            **clock,
            **({"device_memory_mib": self.device_memory[name]} if used else {}),
            **({"device_busy": round(sum(used) / len(used) / 100, 2)} if used else {}),
        }

    def _record(self) -> dict[str, Any]:
        """What run.json and the history of the training say."""
        found: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            record = json.loads((self.run.output / "run.json").read_text())
            found["summaries"] = {
                name: {k: v for k, v in stage["summary"].items() if k not in LONG}
                for name, stage in record["stages"].items()
            }
            if self.run.planned is not None:
                found["work"] = reference_work.measured(self.run.planned, found["summaries"])
            found["warnings"] = [self.hide(text) for text in record["warnings"]]
        with suppress(OSError, ValueError):
            found["training"] = training_speed(self.run.output / "train" / "history.jsonl")
        for name in ("baseline", "eval"):
            summary = found.get("summaries", {}).get(name)
            took = self.stages.get(name, {}).get("seconds")
            if summary and took:
                found["summaries"][name]["rows_per_second"] = round(summary["rows"] / took, 2)
        return found

    def hide(self, text: str) -> str:
        for path, name in self.run.hidden.items():
            text = text.replace(path, name)
        return text


def measure(run: Run, write: Callable[[Watched], None]) -> Watched:
    """Runs the job; calls `write` with what is known after each stage, and at the end."""
    program = ["job"]
    if run.memory_limit is not None:
        program = ["benchmarks.limited_memory", str(run.memory_limit)]
    if run.processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
        program = [*launcher, str(run.processes), "-m", *program]
    environment = dict(os.environ)
    if run.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, run.gpus))
    arguments = [sys.executable, "-m", *program, run.command, run.spec]
    for setting in (*run.settings, f"output.uri={run.output}"):
        arguments += ["--set", setting]
    watched = Watched(run=run)
    started = time.monotonic()
    process = subprocess.Popen(  # noqa: S603
        arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    timers = [
        threading.Timer(run.limit, process.terminate),
        threading.Timer(run.limit + GRACE, process.kill),
    ]
    try:
        for timer in timers:
            timer.start()
        with (
            _device_watched(watched, environment.get("CUDA_VISIBLE_DEVICES", "0")),
            run.output.with_name(LOG).open("w", encoding="utf-8") as log,
        ):
            for line in process.stderr or ():
                log.write(line)
                if watched.add(line, time.monotonic() - started):
                    write(watched)
            watched.exit_code = process.wait()
            watched.total = round(time.monotonic() - started, 2)
    finally:
        for timer in timers:
            timer.cancel()
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
        write(watched)
    print(f"exit code {watched.exit_code}, {watched.total} s in all", flush=True)
    if watched.exit_code:
        print(run.output.with_name(LOG).read_text(encoding="utf-8")[-3000:], flush=True)
    return watched


@contextmanager
def _device_watched(watched: Watched, gpus: str) -> Iterator[None]:
    """Asks nvidia-smi once a second for memory and utilization of the GPUs; nothing without it."""
    query = "--query-gpu=memory.used,utilization.gpu"
    command = ["nvidia-smi", "-i", gpus, query, "--format=csv,noheader,nounits", "-l", "1"]
    try:
        process = subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        yield
        return

    def read() -> None:
        for line in process.stdout or ():
            with suppress(ValueError):
                memory, busy = map(int, line.split(","))
                name = watched.current
                watched.device_memory[name] = max(memory, watched.device_memory.get(name, 0))
                watched.utilization.setdefault(name, []).append(busy)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def training_speed(history: Path) -> dict[str, float]:
    """Seconds and speeds of the training loop by its history.

    `steady_tokens_per_second` is the median of the second half of the logged intervals, when
    compilation and capture are over.
    """
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    later = [step["tokens_per_second"] for step in steps[len(steps) // 2 :]]
    return {
        "logged": len(steps),
        "loop_seconds": steps[-1]["seconds"],
        "first_interval_seconds": steps[0]["seconds"],
        "steady_tokens_per_second": round(median(later), 1),
        "slowest_tokens_per_second": min(later),
        "fastest_tokens_per_second": max(later),
        "data_wait_share": round(median(step["data_wait_share"] for step in steps), 4),
    }
