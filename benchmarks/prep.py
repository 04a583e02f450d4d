"""Measures prep: rows per second, peak memory and peak disk, by number of rows and processes.

    python -m benchmarks.prep --rows 1000 10000 100000 1000000 --workers 1 2

Rows are synthetic: JSON Lines that refer to 1,000 different small PNG files, of which 4 are held
out. Each measurement runs in its own process; peak memory is the largest resident set of the main
process, and of one of its workers. Peak disk is the largest size of prep's files, sampled four
times a second; compare it with the bytes of the images in them. `load` is the machine's load
average at the start.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import record
from job.evaluation.latex import normalize
from job.prep.discovery import find_source
from job.prep.prepare import PrepInputs, prepare
from job.spec.load import load_spec

IMAGES = 1000


def write_rows(folder: Path, count: int) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(IMAGES):
        path = folder / "images" / f"{n}.png"
        if not path.exists():
            noise = rng.integers(0, 256, (7, 42), dtype=np.uint8)
            pixels = np.kron(noise, np.ones((8, 8), np.uint8))
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            path.write_bytes(file.getvalue())
    held_out = [{"image": f"images/{n}.png", "text": f"held out {n}"} for n in range(4)]
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    path = folder / f"rows-{count}.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for n in range(count):
            row = {"image": f"images/{n % IMAGES}.png", "text": rf"\frac{{x_{{{n}}}}}{{y}}"}
            lines.write(json.dumps(row) + "\n")
    return path


def measure(rows: Path, count: int, workers: int, directory: Path) -> dict[str, float]:
    text = f"""
version: 1
name: benchmark
model: {{model_name_or_path: "builtin://ernie-vl-tiny", init: random}}
data:
  train: {{uri: "{rows}"}}
  eval: {{uri: "{rows.parent}/held-out.jsonl"}}
  instruction: Read it.
  num_proc: {workers}
output: {{uri: out}}
"""
    spec = load_spec(text, "benchmark", environ={}).spec.data
    load, clock = os.getloadavg()[0], time.monotonic()
    assert spec.eval is not None  # noqa: S101
    ended, peak = threading.Event(), [0]
    watcher = threading.Thread(target=watch, args=(directory.parent.parent, ended, peak))
    watcher.start()
    data = prepare(
        PrepInputs(
            spec=spec,
            train=(find_source(spec.train[0], "$.data.train"),),
            evaluation=find_source(spec.eval, "$.data.eval"),
            seed=2,
            normalize_label=normalize,
        ),
        directory,
    )
    seconds = time.monotonic() - clock
    ended.set()
    watcher.join()
    image_bytes = sum((rows.parent / "images" / f"{n}.png").stat().st_size for n in range(IMAGES))
    own, worker = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    assert data.train_rows + data.leaked_rows == count  # noqa: S101
    return {
        "rows": count,
        "workers": workers,
        "seconds": round(seconds, 2),
        "rows_per_second": round(count / seconds, 1),
        "peak_mib": round(own, 1),
        "peak_worker_mib": round(worker, 1),
        "peak_disk_mib": round(peak[0] / 2**20, 1),
        "pictures_mib": round(image_bytes * count / IMAGES / 2**20, 1),
        "load": round(load, 1),
    }


def watch(folder: Path, ended: threading.Event, peak: list[int]) -> None:
    """Tracks the peak size of prep's folders in `peak`."""
    while not ended.wait(0.25):
        total = 0
        for path in folder.glob("out*/**/*"):
            with contextlib.suppress(FileNotFoundError):  # renamed during the scan
                total += path.stat().st_size if path.is_file() else 0
        peak[0] = max(peak[0], total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        [count], [workers] = arguments.rows, arguments.workers
        rows = arguments.one / f"rows-{count}.jsonl"
        print(json.dumps(measure(rows, count, workers, arguments.one / "out" / "data")))
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.rows:
            write_rows(Path(folder), count)
            for workers in arguments.workers:
                shutil.rmtree(Path(folder, "out"), ignore_errors=True)  # it would count as disk
                command = [sys.executable, "-m", "benchmarks.prep", "--one", folder]
                command += ["--rows", str(count), "--workers", str(workers)]
                done = subprocess.run(  # noqa: S603
                    command, check=True, stdout=subprocess.PIPE, text=True
                )
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(runs[-1], file=sys.stderr)
    packages = ("pyarrow", "pillow", "numpy", "datasets")
    record.write("prep", "benchmarks.prep", f"{platform.machine()}, CPU", {"runs": runs}, packages)


if __name__ == "__main__":
    main()
