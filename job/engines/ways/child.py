"""Runs trials in processes of their own: a broken kernel may end its process, or hang.

A fault on a GPU poisons the process's context even where it only raises, so that no trial is run
in the process that trains. `__main__` is the other side.

Trials take their time on the CPU, to import libraries and to compile, so those that compile run
beside each other. Their kernels take turns on the GPU, which moves the fastest of a few runs by
less than times are compared by.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from job import log
from job.distributed.cores import cores
from job.engines.ways import COMPILED, GROUPED, trials
from job.families.outcome import Outcome, left
from job.local import daemon_threads

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[3]
START_SECONDS = 600.0
"""To load torch and reach the device, on a node that does so for the first time."""
LIMIT_SECONDS = 240.0
"""Of one trial, most of which compiles kernels."""


class _Failure(NamedTuple):
    """Why a process tried no more."""

    reason: str
    untried: bool
    of_all: bool
    """Whether it holds for all trials that are left, not only for the first of them."""


class _Message(NamedTuple):
    outcome: Outcome | None
    done: bool


def run(
    names: Sequence[str],
    device: "torch.device",
    *,
    module: str = trials.__name__,
    limit: float = LIMIT_SECONDS,
) -> list[Outcome]:
    """The outcomes of the trials in `module`, in their order.

    If a process ends or takes longer than `limit` seconds in a trial, that way is left and the
    next are tried in a new process. Once a process could not use the device at all, those that no
    other has begun are left as untried.
    """
    unusable: list[_Failure] = []

    def run_group(group: Sequence[str]) -> list[Outcome]:
        return _run_group(group, device, module, limit, unusable)

    threads = max(2, cores() // 2)
    found = daemon_threads.for_each(run_group, groups(names), threads=threads, name="trials")
    return sorted(chain(*found), key=lambda outcome: names.index(outcome.way))


def groups(names: Sequence[str]) -> list[list[str]]:
    """The trials of each process: those that compile have one each, and the others share one."""
    compiling = [name for name in names if name == COMPILED or name.startswith(GROUPED)]
    others = [name for name in names if name not in compiling]
    return [*([others] if others else []), *([name] for name in compiling)]


def _run_group(
    names: Sequence[str],
    device: "torch.device",
    module: str,
    limit: float,
    unusable: list["_Failure"],
) -> list[Outcome]:
    """Adds to `unusable` why no process can use the device, and stops at what others have added."""
    found: list[Outcome] = []
    waiting = list(names)
    while waiting and not unusable:
        outcomes, done, failure = _run(waiting, device, module, limit)
        found += outcomes
        waiting = waiting[done:]
        if failure is None:
            continue
        if failure.of_all:
            unusable.append(failure)
        else:
            found += _left(waiting[:1], failure)
            waiting = waiting[1:]
    return found + _left(waiting, unusable[0]) if waiting else found


def _left(names: Sequence[str], failure: "_Failure") -> list[Outcome]:
    return [left(name, failure.reason, passing=True, untried=failure.untried) for name in names]


def _run(
    names: Sequence[str], device: "torch.device", module: str, limit: float
) -> tuple[list[Outcome], int, "_Failure | None"]:
    """The outcomes, how many trials were completed, and why no more were."""
    parent, where = str(os.getpid()), str(device)
    command = [sys.executable, "-P", "-m", "job.engines.ways", parent, module, where, *names]
    found: list[Outcome] = []
    done, started = 0, False
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(  # noqa: S603
            command, env=environ(), stdout=subprocess.PIPE, stderr=said, text=True
        )
        try:
            lines = _lines(child)
            while True:
                try:
                    line = lines.get(timeout=limit if started else START_SECONDS)
                except queue.Empty:
                    reason = f"not done after {log.duration(limit if started else START_SECONDS)}"
                    return found, done, _Failure(reason, untried=not started, of_all=not started)
                if line is None:
                    break
                if (message := _message(line)) is None:
                    continue
                started = True
                if message.outcome is not None:
                    found.append(message.outcome)
                done += message.done
        finally:
            child.kill()
            code = child.wait()
        reason = _last_line(said)
    # The outcome of a completed trial already says if it failed.
    if done == len(names) or (done and code == 1):
        return found, done, None
    if not started:
        reason = f"no process could try it: {reason}"
        return found, done, _Failure(reason, untried=True, of_all=True)
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    # The kernel ends processes by SIGKILL if memory is short.
    full = code == -signal.SIGKILL
    reason = f"its trial ended the process: {ended} {reason}".rstrip()
    return found, done, _Failure(reason, untried=full, of_all=False)


def _message(line: str) -> "_Message | None":
    """What a line says; None if it is not one of `__main__`'s, but a library's."""
    try:
        said = json.loads(line)
        outcome = Outcome(**said["outcome"]) if "outcome" in said else None
    except (ValueError, TypeError, KeyError):
        return None
    known = outcome is not None or "started" in said or "done" in said
    return _Message(outcome, done="done" in said) if known else None


def environ() -> dict[str, str]:
    """In which a process imports this very package, and compiles its few kernels by itself.

    torch's compiler would start a process for each core, which costs more than they save.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _lines(child: "subprocess.Popen[str]") -> "queue.Queue[str | None]":
    """The lines of the child's messages as they come, then None."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read(out: IO[str]) -> None:
        for line in out:
            if line.startswith("{"):
                lines.put(line)
        lines.put(None)

    assert child.stdout is not None
    threading.Thread(target=read, args=(child.stdout,), daemon=True).start()
    return lines


def _last_line(said: IO[str]) -> str:
    said.seek(0)
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1] if lines else ""
