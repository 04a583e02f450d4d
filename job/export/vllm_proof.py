"""Proof by serving: a real vLLM loads what was exported and answers the probes.

It runs in a process of its own, with the interpreter that `JOB_VLLM_PYTHON` names, because vLLM
pins other versions than training does; this interpreter where nothing is named.
"""

import base64
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job import log, signals
from job.errors import ProofError, SpecError
from job.export.proof import PROBE_TOKENS, Outputs
from job.families.base import Family
from job.prep.images import decode
from job.prep.rows import EncodedImage, Message, Part, Row

PYTHON = "JOB_VLLM_PYTHON"
START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 1800, 300, 20
CONTEXT = 4096
NO_THINKING = {"enable_thinking": False}
"""Answers are trained behind an empty thinking block; some templates think unless told."""
BASE, ADAPTER = "exported", "adapter"
_ERROR = re.compile(r"\bERROR\b|^\S*Error: ")
_TAIL = 6  # lines of the server's log in an error


@dataclass(frozen=True, kw_only=True)
class Served:
    """How vLLM's answers compare with the trained model's."""

    probes: int
    same_answers: int
    tokens: int
    """Greedy tokens compared, up to where an answer parts."""
    largest_logprob_difference: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Token ids, as vLLM saw and wrote them."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The answer's tokens' log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running vLLM."""

    url: str
    log: Path

    def ask(self, messages: Sequence[Message], images: Sequence[EncodedImage], model: str) -> Reply:
        """The greedy answer of at most `PROBE_TOKENS` tokens.

        Raises ProofError where the server refuses or dies.
        """
        body = {
            "model": model,
            "messages": [openai(message, images) for message in messages],
            "max_tokens": PROBE_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "return_token_ids": True,
            "chat_template_kwargs": NO_THINKING,
        }
        request = urllib.request.Request(  # noqa: S310 - an address of our own
            f"{self.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:  # noqa: S310
                found = json.load(reply)
            choice = found["choices"][0]
            return Reply(
                prompt=tuple(found["prompt_token_ids"]),
                answer=tuple(choice["token_ids"]),
                logprobs=tuple(float(token["logprob"]) for token in choice["logprobs"]["content"]),
            )
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            raise _failed(f"vLLM refused a probe: {error.code} {said}", self.log) from error
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _failed(f"vLLM gave no answer to a probe: {error}", self.log) from error


def interpreter() -> str:
    """The Python that runs vLLM."""
    return os.environ.get(PYTHON) or sys.executable


def require_vllm() -> None:
    """Raises SpecError where there is no vLLM to serve with: before anything is trained."""
    python = interpreter()
    if python == sys.executable:
        there = importlib.util.find_spec("vllm") is not None
    else:
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        try:
            done = subprocess.run([python, "-c", look], capture_output=True)  # noqa: S603
            there = done.returncode == 0
        except OSError:
            there = False
    if not there:
        raise SpecError(
            "$.export.verify",
            f"asks for a proof by vLLM, which {python} does not have",
            value="vllm",
            fix=f"name an interpreter that has it in {PYTHON}, or set export.verify: reload",
        )


def prove(
    server: Server,
    family: Family,
    rows: Sequence[Row],
    expected: Outputs,
    rounding: float,
    model: str = BASE,
) -> Served:
    """Asks the probes and compares prompts and greedy answers, token by token.

    Up to and where an answer parts from the trained model's, the log-probabilities may differ by
    `rounding`, and it may part only at a token that the model chose by less than that margin (in
    logits). Raises ProofError where either is more, or where vLLM saw another prompt than was
    trained.
    """
    started, same, tokens, largest = time.monotonic(), 0, 0, 0.0
    for row, wanted, margins, logprobs in zip(
        rows, expected.answers, expected.margins, expected.logprobs, strict=True
    ):
        reply = server.ask(row.prompt, row.images, model)
        prompt = family.encode_prompt(row.id, row.prompt, row.images).input_ids
        if reply.prompt != tuple(prompt):
            raise ProofError(
                f"served {model}: {row.id}",
                f"vLLM saw a prompt of {len(reply.prompt)} tokens that is not the one trained "
                f"({len(prompt)} tokens, parting at {_parting(reply.prompt, prompt)})",
                fix="export again; the processor and template in the directory are not the run's",
            )
        answer = _ended(wanted, family.end_tokens)
        at = _parting(reply.answer, answer)
        tokens += at
        # At the parting too: each took its own likeliest token, and these are as likely.
        compared = zip(reply.logprobs[: at + 1], logprobs, strict=False)
        largest = max([largest, *(abs(one - other) for one, other in compared)])
        if not largest <= rounding:
            raise ProofError(
                f"served {model}: {row.id}",
                f"vLLM's log-probabilities differ from the trained model's by {largest:.2g}; "
                f"rounding explains {rounding:.2g}",
                fix="do not serve it; report this with the run's export.json",
            )
        if at == max(len(answer), len(reply.answer)):
            same += 1
        elif at >= len(margins) or margins[at] > rounding:
            raise ProofError(
                f"served {model}: {row.id}",
                f"vLLM's greedy answer parts from the trained model's at token {at}, which that "
                "chose clearly",
                fix="do not serve it; report this with the run's export.json",
            )
    seconds = round(time.monotonic() - started, 3)
    return Served(
        probes=len(rows),
        same_answers=same,
        tokens=tokens,
        largest_logprob_difference=largest,
        seconds=seconds,
    )


@contextmanager
def serve(
    directory: Path, family: Family, *, dtype: str, log_file: Path, adapter: Path | None = None
) -> Iterator[Server]:
    """A vLLM on the family's weights in `directory`.

    It is stopped with all its processes on the way out, however that is. `adapter` is served
    beside it under the name `ADAPTER`. Raises ProofError where it does not start.
    """
    port = _free_port()
    command = [interpreter(), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(directory), "--served-model-name", BASE, *family.vllm_arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager"]
    command += ["--max-num-seqs", "2", "--max-model-len", str(_context(directory))]
    if adapter is not None:
        command += ["--enable-lora", "--max-lora-rank", str(_rank(adapter))]
        command += ["--lora-modules", f"{ADAPTER}={adapter}"]
        command += family.vllm_adapter_arguments
    # What is served is on the disk; nothing is to be fetched, and nobody told of it.
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log_file.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
            preexec_fn=signals.die_with_parent,  # it holds a GPU, and would outlive a killed job
        )
    try:
        server = Server(url=f"http://127.0.0.1:{port}", log=log_file)
        _wait(server, process)
        yield server
    finally:
        _stop(process)


def _wait(server: Server, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + START_SECONDS
    log.info("vLLM: starting", python=interpreter())
    while True:
        if process.poll() is not None:
            raise _failed(f"vLLM ended with {process.returncode} before it served", server.log)
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):  # noqa: S310
                return
        except OSError as error:
            if time.monotonic() > end:
                raise _failed(f"vLLM did not start in {START_SECONDS} s", server.log) from error
        time.sleep(1)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Its workers are children of their own; the session's group has them all."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def openai(message: Message, images: Sequence[EncodedImage]) -> dict[str, Any]:
    return {"role": message.role, "content": [_part(part, images) for part in message.parts]}


def _part(part: Part, images: Sequence[EncodedImage]) -> dict[str, Any]:
    if part.image is None:
        return {"type": "text", "text": part.text}
    # As it was trained: of a file with 16 bits, say, vLLM would make another image.
    file = io.BytesIO()
    decode(images[part.image]).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _parting(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place at which they differ; the shorter one's length where it begins the other."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _ended(answer: Sequence[int], end_tokens: Sequence[int]) -> tuple[int, ...]:
    """Up to the first end token: what follows fills the batch."""
    last = next((i for i, token in enumerate(answer) if token in end_tokens), len(answer))
    return tuple(answer[: last + 1])


def _rank(adapter: Path) -> int:
    """vLLM's next larger rank: it knows 8, 16, 32 and so on."""
    rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
    return max(8, 1 << (rank - 1).bit_length())


def _context(directory: Path) -> int:
    """Tokens to serve for: probes are short, and vLLM refuses more than the model's positions."""
    path = directory / "config.json"
    if not path.is_file():
        return CONTEXT  # vLLM says what is missing
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config") or {}
    known = text.get("max_position_embeddings", config.get("max_position_embeddings", CONTEXT))
    return min(CONTEXT, int(known))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _failed(reason: str, log_file: Path) -> ProofError:
    lines = log_file.read_text(errors="replace").splitlines()
    said = [line for line in lines if _ERROR.search(line)][-_TAIL:] or lines[-_TAIL:]
    return ProofError("served", f"{reason}\n" + "\n".join(said), fix=f"the whole log: {log_file}")
