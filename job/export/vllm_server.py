"""Runs a vLLM server for exported weights as a child process.

vLLM needs other package versions than training, so `JOB_VLLM_PYTHON` may name the interpreter of a
separate environment; the default is this one.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from job import log, signals
from job.errors import ProofError, SpecError
from job.export.chat_client import ChatClient, ChatError
from job.families.base import Family

PYTHON = "JOB_VLLM_PYTHON"
START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 1800, 300, 20
MAX_CONTEXT = 4096
BASE, ADAPTER = "exported", "adapter"
"""The names of the served models."""
_ERROR = re.compile(r"\bERROR\b|^\S*Error: ")
_TAIL = 6  # lines of the server's log in an error


@dataclass(frozen=True, kw_only=True)
class VllmServer:
    client: ChatClient
    log: Path

    def error(self, message: str) -> ProofError:
        """A ProofError with the end of the server's log."""
        lines = self.log.read_text(errors="replace").splitlines()
        tail = [line for line in lines if _ERROR.search(line)][-_TAIL:] or lines[-_TAIL:]
        return ProofError(
            "served", f"{message}\n" + "\n".join(tail), fix=f"see the full log: {self.log}"
        )


def interpreter() -> str:
    """The Python that runs vLLM."""
    return os.environ.get(PYTHON) or sys.executable


def require_vllm() -> None:
    """Raises SpecError if vLLM is not installed; checked before training starts."""
    python = interpreter()
    if python == sys.executable:
        installed = importlib.util.find_spec("vllm") is not None
    else:
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True)  # noqa: S603
            installed = done.returncode == 0
        except OSError:
            installed = False
    if not installed:
        raise SpecError(
            "$.export.verify",
            f"needs vLLM, which {python} does not have",
            value="vllm",
            fix=f"set {PYTHON} to an interpreter that has it, or set export.verify: reload",
        )


@contextmanager
def serve(
    directory: Path, family: Family, *, dtype: str, log_file: Path, adapter: Path | None = None
) -> Iterator[VllmServer]:
    """Runs vLLM on the weights in `directory`, and stops it with all its processes.

    `adapter` is served too, under the name `ADAPTER`. Raises ProofError if vLLM does not start.
    """
    port = _free_port()
    # All weights are local: no downloads, no telemetry.
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log_file.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603
            _command(directory, family, dtype, port, adapter),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
            # Or it would outlive a killed job and keep the GPU.
            preexec_fn=partial(signals.die_with_parent, os.getpid()),
        )
    try:
        client = ChatClient(url=f"http://127.0.0.1:{port}", timeout=ANSWER_SECONDS)
        server = VllmServer(client=client, log=log_file)
        _wait_until_ready(server, process)
        yield server
    finally:
        _stop(process)


def _command(
    directory: Path, family: Family, dtype: str, port: int, adapter: Path | None
) -> list[str]:
    command = [interpreter(), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(directory), "--served-model-name", BASE, *family.vllm_arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager"]
    command += ["--max-num-seqs", "2", "--max-model-len", str(_context_length(directory))]
    if adapter is not None:
        command += ["--enable-lora", "--max-lora-rank", str(_max_rank(adapter))]
        command += ["--lora-modules", f"{ADAPTER}={adapter}"]
        command += family.vllm_adapter_arguments
    return command


def _wait_until_ready(server: VllmServer, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + START_SECONDS
    log.info("vLLM: starting", python=interpreter())
    while True:
        if process.poll() is not None:
            raise server.error(f"vLLM exited with {process.returncode} before it was ready")
        try:
            server.client.check_ready(timeout=5)
            return
        except ChatError as error:
            if time.monotonic() > end:
                raise server.error(f"vLLM did not start within {START_SECONDS} s") from error
        time.sleep(1)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stops the process group, which includes vLLM's workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _max_rank(adapter: Path) -> int:
    """The adapter's rank, rounded up to a value that vLLM supports: 8, 16, 32 and so on."""
    rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
    return max(8, 1 << (rank - 1).bit_length())


def _context_length(directory: Path) -> int:
    """The context length to serve: probes are short, but vLLM rejects more than the model's."""
    path = directory / "config.json"
    if not path.is_file():
        return MAX_CONTEXT  # vLLM will report the missing file
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config") or {}
    limit = text.get("max_position_embeddings", config.get("max_position_embeddings", MAX_CONTEXT))
    return min(MAX_CONTEXT, int(limit))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
