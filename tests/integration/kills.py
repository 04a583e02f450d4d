"""Trainings that kill themselves at a change of what is stored, run by the dozen.

A process that has the libraries loaded and has trained once is forked for each run: starting anew
takes ten times as long. The runs are whole processes with the job's own command, which end by
SIGKILL from within, right before a change at the output. What lies there before one change is what
lies there after the one before.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import job.pipeline.runner
from job import storage
from job.artifacts import sbom
from tests.jobs import UNVALIDATED, sets

RESULT = ("steps", "epochs", "tokens", "rows", "dropped_rows", "first_loss", "final_loss")
HISTORY = ("step", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss", "eval_cer")
VALIDATION = "validation batch"
"""A change that is none: a process may also be killed before a batch of a validation."""
WITHOUT_VALIDATION = ("trainer_state.json", "manifest.json")
"""Files of a checkpoint that know the step's validation, unless a stop came before it."""

TIMES = ("seconds", "share")

Picked = Callable[[list[str]], list[int]]
"""The numbers of those changes, of all that a run makes, before which it is to end."""


@dataclass(frozen=True)
class Kill:
    """A signal that a process sends itself before one of its changes."""

    change: int
    """From 0 on."""
    signal: int


@dataclass(frozen=True)
class Training:
    """A small training of specs/latex.yaml, with what differs from it."""

    name: str
    settings: Mapping[str, object]

    def arguments(self, output: str, cache: Path) -> list[str]:
        small = {
            **UNVALIDATED,
            "data.train.limit": 6,
            "data.eval.limit": 2,
            "lora.lora_dropout": 0.1,
            "train.per_device_train_batch_size": 2,
            "train.logging_steps": 1,
            "train.save_total_limit": 2,
            "runtime.cache_dir": cache,
        }
        return ["train", "specs/latex.yaml", "--output", output, *sets(small | {**self.settings})]


def facts(output: str) -> dict[str, Any]:
    """History, weights, result and every file of every checkpoint, without what tells the time."""
    at = partial(storage.join, output)
    record = json.loads(storage.read_text(at(".stages", "train.json")))
    lines = storage.read_text(at("train", "history.jsonl")).splitlines()
    stored = storage.list_files(at("checkpoints"))
    files = {entry.path: storage.read_bytes(at("checkpoints", entry.path)) for entry in stored}
    validation = record["summary"]["validation"]
    weights = ("adapter/", "adapter-vllm/", "weights/")
    return {
        "history": [
            [(key, value) for key, value in json.loads(line).items() if key in HISTORY]
            for line in lines
        ],
        "validation": validation and {k: v for k, v in validation.items() if k not in TIMES},
        "weights": [file for file in record["files"] if file["path"].startswith(weights)],
        "result": {key: record["summary"][key] for key in RESULT},
        "checkpoints": {path: hashlib.sha256(data).hexdigest() for path, data in files.items()},
    }


def watch(output: str, kill: Kill | None, seen: Path) -> None:
    """From now on notes in `seen` what changes at `output`, and sends this process the signal of
    `kill` right before its change.

    A change is a file that takes its name or goes, at a place other than the lease's.
    """
    lock, changes = threading.Lock(), list[str]()
    root = output.partition("://")[2] or output

    def note(change: str) -> None:
        with lock:
            changes.append(change)
            with seen.open("a") as lines:
                lines.write(changes[-1] + "\n")
            if kill is not None and len(changes) == kill.change + 1:
                os.kill(os.getpid(), kill.signal)

    def comes(kind: str, path: str) -> None:
        if path.startswith(f"{root}/") and "/.lease" not in path:
            note(f"{kind} {path.removeprefix(f'{root}/')}")

    _watch_validations(lambda: note(VALIDATION))

    if "://" in output:
        _watch_objects(comes)
    else:
        _watch_files(comes)


def _watch_validations(comes: Callable[[], None]) -> None:
    from job.train.validation import Validator

    batch = Validator._batch

    def watched(self: Validator, rows: list[int]) -> Any:
        comes()
        return batch(self, rows)

    Validator._batch = watched  # type: ignore[method-assign]


def _watch_files(comes: Callable[[str, str], None]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            comes("put", str(arguments[1]))
        elif event in ("os.remove", "os.rmdir") and ".writing" not in str(arguments[0]):
            path, folder = str(arguments[0]), arguments[1]
            if folder >= 0:
                path = str(Path(f"/proc/self/fd/{folder}").readlink() / path)
            comes("delete", path)

    sys.addaudithook(hook)


def _watch_objects(comes: Callable[[str, str], None]) -> None:
    from job.storage.backends.s3 import S3

    def watched(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: S3, uri: str, *arguments: Any) -> Any:
            comes(kind, uri.partition("://")[2])
            return work(self, uri, *arguments)

        return call

    for name, kind in (("put", "put"), ("put_new", "put"), ("delete", "delete")):
        setattr(S3, name, watched(kind, getattr(S3, name)))


class Farm:
    """Runs trainings in processes forked from this one."""

    def __init__(self, place: Path) -> None:
        """`place` is for caches and what the runs say."""
        torch.set_num_threads(1)  # threads of the parent are missing in its children
        self._place = place
        text = sbom.to_text()  # the same for every run, and half of its time
        job.pipeline.runner.sbom.to_text = lambda: text
        self._start(Training("warm", {"train.max_steps": 1}), str(place / "warm"))

    def _start(self, training: Training, output: str) -> None:
        from job.cli.app import app

        app(training.arguments(output, self._place / "cache"), standalone_mode=False)

    def run(self, training: Training, output: str, kill: Kill | None = None) -> int:
        """The exit code of a run, or minus the signal that ended it."""
        self._seen.unlink(missing_ok=True)

        def train() -> None:
            watch(output, kill, self._seen)
            self._start(training, output)

        return self._in_child(train)

    def facts(self, output: str) -> dict[str, Any]:
        """Those of a finished training. Read in a child: connections do not outlive a fork."""
        path = self._place / "facts.json"
        assert self._in_child(lambda: path.write_text(json.dumps(facts(output)))) == 0, self.said()
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    @property
    def _seen(self) -> Path:
        return self._place / "changes.txt"

    def changes(self) -> list[str]:
        """What the last run changed at its output, in its order."""
        return self._seen.read_text().splitlines() if self._seen.exists() else []

    def said(self) -> str:
        """The end of what the last child said."""
        return (self._place / "said.txt").read_text()[-3000:]

    def _in_child(self, work: Callable[[], object]) -> int:
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        code = 70
        try:
            # The pool of threads is replaced at its first use after a fork, which two threads that
            # get there together do not survive; here there is one.
            torch.set_num_threads(1)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            descriptor = os.open(self._place / "said.txt", flags, 0o600)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            work()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # noqa: BLE001 - the child has nobody above it
            traceback.print_exc()
        finally:
            os._exit(code)


@dataclass(frozen=True)
class Found:
    """What killed and resumed runs of one training came to."""

    killed: int
    differing: Sequence[str]
    """The placements after which something was not as undisturbed, with what it was."""


def try_all(place: Path, root: str, training: Training, picked: Picked, sent: int) -> Found:
    """Sends runs of the training a signal at the picked ones of its changes, and finishes each."""
    farm = Farm(place)
    undisturbed = f"{root}/undisturbed"
    assert farm.run(training, undisturbed) == 0, farm.said()
    changes, expected = farm.changes(), farm.facts(undisturbed)
    differing, killed = list[str](), 0
    for number in picked(changes):
        output = f"{root}/killed-{number}"
        code = farm.run(training, output, Kill(number, sent))
        where = f"{training.name}, before change {number}, {farm.changes()[-1]}"
        killed += code == -sent or (sent == signal.SIGTERM and code == 143)
        code = farm.run(training, output)
        if code != 0:
            differing.append(f"{where}: the next run ended with {code}: {farm.said()}")
            continue
        found = farm.facts(output)
        if sent == signal.SIGTERM:  # a stop stores a checkpoint that may take another's place
            both = found["checkpoints"].keys() & expected["checkpoints"].keys()
            if VALIDATION in where:
                both = {path for path in both if not path.endswith(WITHOUT_VALIDATION)}
            found["checkpoints"] = expected["checkpoints"] | {
                path: found["checkpoints"][path] for path in both
            }
        differing += [f"{where}: other {k}" for k, v in expected.items() if found[k] != v]
        shutil.rmtree(output, ignore_errors=True)
    return Found(killed, differing)
