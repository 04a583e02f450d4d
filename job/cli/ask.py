"""`job ask`: asks an OpenAI-compatible server about an image."""

import io
import os
import time
from pathlib import Path

from job.errors import InputError
from job.evaluation.answer_lengths import THINKING_TOKENS
from job.export.chat_client import ChatClient, ChatError, ChatMessage, image_part, text_part

ANSWER_SECONDS = 600
"""The first request may wait for kernels to compile."""
MAX_TOKENS = 256
FORMULA = r"\frac{a}{b} + x^{2}"
"""Rendered as the default image."""


def ask(
    url: str,
    model: str,
    question: str,
    image: Path | None,
    wait: float = 0,
    *,
    system: str | None = None,
    with_image: bool = True,
    enable_thinking: bool = False,
) -> str:
    """The answer to `question` about `image`, or about a rendered formula if there is none.

    `system` is the system prompt, which models trained with `data.system` need.
    `with_image=False` is for text-only models, `enable_thinking` for those trained with thoughts.
    Raises InputError if the server is not ready within `wait` seconds, refuses, or gives no answer.
    """
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise InputError(url, "must start with http:// or https://")
    client = ChatClient(
        url=url, timeout=ANSWER_SECONDS, api_key=os.environ.get("OPENAI_API_KEY") or None
    )
    _wait_until_ready(client, wait)
    content = [text_part(question)]
    if with_image:
        content.insert(0, image_part(_rendered_formula() if image is None else _read(image)))
    messages: list[ChatMessage] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [text_part(system)]})
    try:
        reply = client.complete(
            model,
            messages,
            max_tokens=MAX_TOKENS + THINKING_TOKENS * enable_thinking,
            enable_thinking=enable_thinking,
        )
    except ChatError as error:
        raise InputError(url, f"the server {error}", fix="check the server's log") from error
    try:
        answer = str(reply["choices"][0]["message"]["content"] or "").strip()
    except (LookupError, TypeError) as error:
        raise InputError(url, f"the server's reply has no message: {reply}") from error
    if not answer:
        raise InputError(url, "the server's answer is empty", fix="check the server's log")
    return answer


def _wait_until_ready(client: ChatClient, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            client.check_ready()
            return
        except ChatError as error:
            if time.monotonic() >= end:
                raise InputError(
                    client.url,
                    f"the server is not ready: {error}",
                    fix="check the server's log, or wait longer: --wait 1800",
                ) from error
        time.sleep(min(5.0, max(0.1, seconds / 10)))


def _read(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise InputError("--image", "cannot be read", value=image) from error


def _rendered_formula() -> bytes:
    from job.prep.formulas import render_latex

    image = render_latex(FORMULA)
    assert image is not None
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
