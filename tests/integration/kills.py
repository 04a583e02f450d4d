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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import job.pipeline
from job import sbom, storage
from tests.jobs import sets

FACTS = ("steps", "epochs", "tokens", "rows", "dropped_rows", "first_loss", "final_loss")
HISTORY = ("step", "epoch", "loss", "learning_rate", "grad_norm")

Kill = Callable[[list[str]], bool]
"""Whether to end the process, from the changes up to the one that comes next: `rename PATH`."""


@dataclass(frozen=True)
class Training:
    """A small training of specs/latex.yaml, with what differs from it."""

    name: str
    settings: Mapping[str, object]

    def arguments(self, output: str, cache: Path) -> list[str]:
        small = {
            "data.train.limit": 6,
            "data.eval.limit": 2,
            "lora.lora_dropout": 0.1,
            "train.per_device_train_batch_size": 2,
            "train.logging_steps": 1,
            "train.save_total_limit": 2,
            "runtime.cache_dir": cache,
        }
        return ["train", "specs/latex.yaml", "--output", output, *sets(small | {**self.settings})]


class Output:
    """What is at an output, without what tells the time."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def facts(self) -> dict[str, Any]:
        """History, weights, result and every file of every checkpoint."""
        at = partial(storage.join, self.uri)
        record = json.loads(storage.read_text(at(".stages", "train.json")))
        lines = storage.read_text(at("train", "history.jsonl")).splitlines()
        return {
            "history": [{key: json.loads(line)[key] for key in HISTORY} for line in lines],
            "weights": {
                file["path"]: file["sha256"]
                for file in record["files"]
                if file["path"].startswith(("adapter/", "adapter-vllm/", "weights/"))
            },
            "result": {key: record["summary"][key] for key in FACTS},
            "checkpoints": {
                entry.path: hashlib.sha256(
                    storage.read_bytes(at("checkpoints", entry.path))
                ).hexdigest()
                for entry in storage.list_files(at("checkpoints"))
            },
        }


def watch(output: str, kill: Kill) -> None:
    """From now on ends this process before the change at `output` for which `kill` says so.

    A change is a file that takes its name or goes, at a place other than the lease's.
    """
    lock, seen = threading.Lock(), list[str]()
    root = output.partition("://")[2] or output

    def comes(kind: str, path: str) -> None:
        if not path.startswith(f"{root}/") or "/.lease" in path:
            return
        with lock:
            seen.append(f"{kind} {path.removeprefix(f'{root}/')}")
            if kill(seen):
                os.kill(os.getpid(), signal.SIGKILL)

    if "://" in output:
        _watch_objects(comes)
    else:
        _watch_files(comes)


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
    from job.storage import remote

    def watched(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(uri: str, *arguments: Any) -> Any:
            comes(kind, uri.partition("://")[2])
            return work(uri, *arguments)

        return call

    for name, kind in (("put", "put"), ("put_new", "put"), ("delete", "delete")):
        setattr(remote, name, watched(kind, getattr(remote, name)))


def at_change(number: int) -> Kill:
    """At the change of that number, from 0 on."""
    return lambda seen: len(seen) == number + 1


class Farm:
    """Runs trainings in processes forked from this one."""

    def __init__(self, place: Path) -> None:
        """`place` is for caches and what the runs say."""
        import torch

        torch.set_num_threads(1)  # threads of the parent are missing in its children
        self._place = place
        text = sbom.to_text()  # the same for every run, and half of its time
        job.pipeline.sbom.to_text = lambda: text  # type: ignore[attr-defined]
        warm = Training("warm", {"train.max_steps": 1})
        self._start(warm, str(place / "warm"))

    def _start(self, training: Training, output: str) -> None:
        from job.cli import app

        arguments = training.arguments(output, self._place / "cache")
        app(arguments, standalone_mode=False)

    def run(self, training: Training, output: str, kill: Kill | None = None) -> int | None:
        """The exit code of a run, or None if it killed itself."""
        pid = os.fork()
        if pid == 0:
            self._child(training, output, kill)
        status = os.waitpid(pid, 0)[1]
        return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)

    def changes(self, training: Training, output: str) -> list[str]:
        """The changes that an undisturbed run makes at the output, in its order."""
        path = self._place / "changes.txt"

        def write(seen: list[str]) -> bool:
            path.write_text("\n".join(seen))
            return False

        code = self.run(training, output, write)
        assert code == 0, self.said()
        return path.read_text().splitlines()

    def said(self) -> str:
        return (self._place / "said.txt").read_text()

    def _child(self, training: Training, output: str, kill: Kill | None) -> None:
        code = 70
        try:
            descriptor = os.open(
                self._place / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600
            )
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            if kill is not None:
                watch(output, kill)
            self._start(training, output)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # noqa: BLE001 - the child has nobody above it
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)


@dataclass(frozen=True)
class Found:
    """What killed and resumed runs of one training came to."""

    killed: int
    differing: Sequence[str]
    """The placements after which something was not as undisturbed, with what it was."""


def try_all(place: Path, training: Training, pick: Callable[[list[str]], list[int]]) -> Found:
    """Kills runs of the training at the picked ones of its changes, and finishes each."""
    farm = Farm(place)
    whole = str(place / "undisturbed")
    changes = farm.changes(training, whole)
    expected = Output(whole).facts()
    differing, killed = list[str](), 0
    for number in pick(changes):
        output = place / "killed"
        shutil.rmtree(output, ignore_errors=True)
        where = f"{training.name}, before change {number}, as {changes[number]}"
        if farm.run(training, str(output), at_change(number)) is not None:
            differing.append(f"{where}: not killed")
            continue
        killed += 1
        code = farm.run(training, str(output))
        if code != 0:
            differing.append(f"{where}: the next run ended with {code}: {farm.said()[-2000:]}")
            continue
        facts = Output(str(output)).facts()
        differing += [f"{where}: {k}" for k, v in expected.items() if facts[k] != v]
    return Found(killed, differing)


if __name__ == "__main__":
    found = try_all(
        Path(sys.argv[1]),
        Training("try", json.loads(sys.argv[2])),
        lambda changes: list(range(*map(int, sys.argv[3].split(":")))),
    )
    print(json.dumps(found.__dict__, indent=1))
