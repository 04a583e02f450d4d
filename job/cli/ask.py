"""`job ask`: asks a server that speaks OpenAI's protocol, about an image, and prints its answer."""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from job.errors import InputError
from job.export.vllm_proof import NO_THINKING
from job.redaction import redact

SECONDS = 600
"""A first question may wait for kernels to be compiled."""
FORMULA = r"\frac{a}{b} + x^{2}"
"""What is drawn where no image is given."""
_READ_OF_ERROR, _SHOWN_OF_ERROR = 65_536, 500


def ask(
    url: str,
    model: str,
    question: str,
    image: Path | None,
    wait: float = 0,
    *,
    shown: bool = True,
) -> str:
    """The answer to `question` about the picture, or about a drawn formula where none is given.

    `shown=False` asks without a picture, as models of text alone are asked.

    Raises InputError where the server is not ready within `wait` seconds, refuses, or answers
    nothing.
    """
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise InputError(url, "must be an address with http:// or https://")
    _wait(f"{url}/health", wait)
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if shown:
        data = _drawn() if image is None else _read(image)
        kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
        picture = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    reply = _post(
        f"{url}/v1/chat/completions",
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 256,
            "temperature": 0,
            "chat_template_kwargs": NO_THINKING,
        },
    )
    try:
        answer = str(reply["choices"][0]["message"]["content"] or "").strip()
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(url, f"the reply is not a chat completion: {reply}") from error
    if not answer:
        raise InputError(url, "the server answered with nothing", fix="look at the server's log")
    return answer


def _wait(url: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):  # noqa: S310
                return
        except (OSError, ValueError, http.client.HTTPException) as error:
            if time.monotonic() >= end:
                raise InputError(
                    url,
                    f"the server is not ready: {error}",
                    fix="look at its log, or wait longer: --wait 1800",
                ) from error
        time.sleep(min(5.0, max(0.1, seconds / 10)))


def _post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:  # noqa: S310
            return json.load(reply)
    except urllib.error.HTTPError as error:
        # Redacted before it is cut, which could leave a part of a key that the server repeats.
        said = redact(error.read(_READ_OF_ERROR).decode(errors="replace"))[:_SHOWN_OF_ERROR]
        raise InputError(url, f"the server refused: {error.code} {said}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(url, f"no answer: {error}", fix="look at the server's log") from error


def _read(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise InputError("--image", "cannot be read", value=image) from error


def _drawn() -> bytes:
    from job.prep.formulas import render_latex

    picture = render_latex(FORMULA)
    assert picture is not None
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
