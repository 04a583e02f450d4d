"""Runs the job for tests, as a user does: by its command, in a process of its own."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests import warm

ROOT = Path(__file__).parents[1]

# A whole job in about ten seconds, from the specs that ship.
SMALL = {
    "train.max_steps": 4,
    "train.save_steps": 2,
    "train.warmup_steps": 1,
    "train.per_device_train_batch_size": 8,
    "train.logging_steps": 1,
    "eval.max_samples": 6,
    "eval.generation.max_new_tokens": 8,
}

# Of specs/latex.yaml, which validates; most tests are not about that.
UNVALIDATED = {
    "data.validation": "null",
    "train.eval_strategy": "no",
    "train.eval_steps": "null",
    "train.load_best_model_at_end": "false",
}
FORMULAS = {"data.train.limit": 24, "data.eval.limit": 6, **UNVALIDATED}

# Of specs/latex.yaml, which sets keys of LoRA, a full fine-tuning.
FULL = {"lora": "{method: full}"}


def sets(settings: Mapping[str, object]) -> list[str]:
    """The command's arguments for the settings."""
    return [item for key, value in settings.items() for item in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


Running = subprocess.Popen[str] | warm.Process
_started: list[Running] = []


def start(
    *arguments: str,
    cwd: Path = ROOT,
    environ: Mapping[str, str] | None = None,
    err: IO[str] | int = subprocess.PIPE,
    code: str | None = None,
) -> Running:
    """Starts `python -m job`, or `python -c` with the code, with the arguments; what it says goes
    to `err`.

    It is forked from a process with the libraries loaded, unless its environment asks for one that
    starts anew.
    """
    variables = _environ(environ)
    if warm.fits(variables):
        said = err if isinstance(err, int) else err.fileno()
        _started.append(warm.Process(arguments, cwd=cwd, environ=variables, err=said, code=code))
        return _started[-1]
    process = subprocess.Popen(
        [sys.executable, *(("-m", "job") if code is None else ("-c", code)), *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=err,
        text=True,
    )
    _started.append(process)
    return process


def end_left() -> None:
    """Kills the jobs that were started and have not ended."""
    for process in _started:
        if process.poll() is None:
            process.kill()
            process.wait()
    _started.clear()


def _environ(environ: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "JOB_STORAGE_RETRIES": "1", **(environ or {})}


def make(*arguments: str) -> Finished:
    """Runs `make`, as from a shell: what a `make` around the tests left in the environment is not
    for this one.
    """
    environ = {
        key: text
        for key, text in os.environ.items()
        if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    done = subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def job(
    *arguments: str,
    environ: Mapping[str, str] | None = None,
    timeout: float = 300,
    code: str | None = None,
) -> Finished:
    """Runs `python -m job`, or the code, to its end, as `start` does."""
    process = start(*arguments, environ=environ, code=code)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
        raise AssertionError(f"not done in {timeout} s: job {' '.join(arguments)}\n{err}") from None
    assert process.returncode is not None
    return Finished(process.returncode, out, err)


def small_run(output: str, *more: str, cache: Path) -> list[str]:
    """The arguments of a small run of specs/latex.yaml."""
    settings = {**SMALL, **FORMULAS, "runtime.cache_dir": cache}
    return ["run", "specs/latex.yaml", "--output", output, *sets(settings), *more]


def small_run_of_rows(train: str, output: str, *more: str, cache: Path) -> list[str]:
    """The arguments of a small run of specs/im2latex.yaml over the list at `train`."""
    settings: dict[str, object] = {
        **SMALL,
        "data.train.uri": train,
        "data.eval": "null",
        "data.eval_fraction": 0.2,
        "runtime.cache_dir": cache,
    }
    return ["run", "specs/im2latex.yaml", "--output", output, *sets(settings), *more]


def tool(name: str) -> str:
    """A program that the test environment brings, or else one of the machine's."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found is not None, f"{name} is missing: make test"
    return found


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sums(output: Path) -> dict[str, str]:
    """`SHA256SUMS` by path, after checking that every file is what it says."""
    found = {}
    for line in (output / "SHA256SUMS").read_text().splitlines():
        digest, path = line.split("  ", 1)
        assert hashlib.sha256((output / path).read_bytes()).hexdigest() == digest, path
        found[path] = digest
    return found
