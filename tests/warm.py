"""Runs the job in processes forked from one that has the libraries loaded already.

Importing them takes longer than most of the tests' runs. What runs is the command itself, in a
process of its own with its own environment, standard streams and exit code.
"""

import fcntl
import importlib
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import IO

context = get_context("forkserver")
context.set_forkserver_preload(["tests.integration.preload"])

# Libraries read these while they are imported.
_READ_AT_IMPORT = (
    "BNB_", "CUDA_", "FORCE_COLOR", "FSSPEC_", "GITHUB_ACTIONS", "HF_", "HUGGINGFACE_", "KMP_",
    "LD_", "MKL_", "MPL", "OMP_", "PYTHON", "PY_COLORS", "TERMINAL_WIDTH", "TOKENIZERS_", "TORCH",
    "TRANSFORMERS_", "UNSLOTH_", "XDG_",
)  # fmt: skip
# Torch sets one for processes of its own, to what every process would take. The others are read
# when a GPU is used, when a hub is asked, and when processes connect.
_NOT_READ = {
    "TORCHINDUCTOR_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "HF_TOKEN", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
}  # fmt: skip
_READ_AGAIN = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
"""Forked processes load the modules anew that read these."""
_STARTED_WITH = {**os.environ}


def fits(environ: Mapping[str, str]) -> bool:
    """Whether a process that is forked acts in this environment as one that starts anew.

    Not on a GPU: libraries that are loaded already may have initialized it, which a fork must not.
    """
    if any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        return False
    names = (environ.keys() | _STARTED_WITH.keys()) - _NOT_READ - _READ_AGAIN
    return all(
        environ.get(name) == _STARTED_WITH.get(name)
        for name in names
        if name.startswith(_READ_AT_IMPORT)
    )


def as_if_started() -> None:
    """Makes new processes start as they do in one that starts anew.

    A forked one starts others by a server of its own, which would import all libraries again, and
    outlive it.
    """
    multiprocessing.set_start_method(None, force=True)


def _read_again(environ: Mapping[str, str]) -> None:
    """What the libraries know of the hub by the environment: others ask these modules for it."""
    if any(environ.get(name) != _STARTED_WITH.get(name) for name in _READ_AGAIN):
        for name in ("huggingface_hub.constants", "datasets.config"):
            importlib.reload(sys.modules[name])


class Process:
    """A process that was forked, with what the tests use of a `subprocess.Popen` of text."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environ: Mapping[str, str],
        err: int,
        code: str | None = None,
        terminal: int | None = None,
    ) -> None:
        """`err` is `subprocess.PIPE`, or where standard error goes: a descriptor or `DEVNULL`.

        With `code`, that runs instead of the command, as by `python -c`. With `terminal`, a
        descriptor of one, it begins a session there, with all three streams.
        """
        self.args = ["job", *arguments]
        self._out, out = _pipe()
        self.stderr: IO[str] | None = None
        said = None
        if err == subprocess.PIPE:
            self.stderr, said = _pipe()
        elif err >= 0:
            said = Connection(os.dup(err))
        screen = None if terminal is None else Connection(os.dup(terminal))
        self._process = context.Process(
            target=_main, args=(list(arguments), code, str(cwd), dict(environ), out, said, screen)
        )
        self._process.start()
        for each in (out, said, screen):
            if each is not None:
                each.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of standard output and standard error, once it has ended."""
        if self._out.closed:
            return "", ""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        found = ["", ""]

        def read(number: int, stream: IO[str]) -> None:
            found[number] = stream.read()

        streams = [(0, self._out)] + ([(1, self.stderr)] if self.stderr else [])
        readers = [Thread(target=read, args=each, daemon=True) for each in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if timeout is None else max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if timeout is None else max(0, deadline - time.monotonic()))
        for _, stream in streams:
            stream.close()
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _pipe() -> tuple[IO[str], Connection]:
    """The end to read from, and that which a process can be given."""
    hear, told = os.pipe()
    return os.fdopen(hear, encoding="utf-8", errors="replace"), Connection(told, readable=False)


def _main(
    arguments: list[str],
    code: str | None,
    cwd: str,
    environ: dict[str, str],
    out: Connection,
    err: Connection | None,
    terminal: Connection | None,
) -> None:
    as_if_started()
    if terminal is None:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(out.fileno(), 1)
        os.dup2(nothing if err is None else err.fileno(), 2)
        os.close(nothing)
    else:
        os.setsid()
        for stream in range(3):
            os.dup2(terminal.fileno(), stream)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ^C is a signal
    for each in (out, err, terminal):
        if each is not None:
            each.close()
    os.environ.clear()
    os.environ.update(environ)
    _read_again(environ)
    os.chdir(cwd)
    sys.argv = ["job" if code is None else "-c", *arguments]
    sys.orig_argv = [sys.executable, *(("-m", "job") if code is None else ("-c", code)), *arguments]
    if code is None:
        runpy.run_module("job", run_name="__main__", alter_sys=True)
    else:
        exec(code, {"__name__": "__main__"})  # noqa: S102
