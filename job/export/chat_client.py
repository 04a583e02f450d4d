"""A minimal client for OpenAI-compatible chat servers, such as vLLM: greedy answers, no retries.

huggingface_hub's InferenceClient is unsuitable: it sends HF_TOKEN to every server, and refuses to
connect under HF_HUB_OFFLINE.
"""

import base64
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from job.redaction import redact

_ERROR_READ, _ERROR_SHOWN = 65_536, 500  # bytes and characters of a server's error message
_FAILURES = (OSError, ValueError, http.client.HTTPException)

ChatMessage = dict[str, Any]
"""A role, and its content as a list of parts."""
ContentPart = dict[str, Any]


class ChatError(Exception):
    """Why there is no answer; messages of `complete` are phrased to follow the server's name."""


@dataclass(frozen=True, kw_only=True)
class ChatClient:
    url: str
    """The server's URL, without /v1."""
    timeout: float
    """Seconds to wait for an answer."""
    api_key: str | None = field(default=None, repr=False)

    def check_ready(self, timeout: float = 10) -> None:
        """Raises ChatError unless the server reports that it is healthy."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=timeout):  # noqa: S310
                return
        except _FAILURES as error:
            raise ChatError(str(error)) from error

    def complete(
        self,
        model: str,
        messages: Sequence[ChatMessage],
        *,
        max_tokens: int,
        enable_thinking: bool = False,
        **extra: object,
    ) -> dict[str, Any]:
        """The server's JSON reply to a greedy request; `extra` has further request fields.

        `enable_thinking` is always sent: some chat templates think by default, but answers without
        thoughts are trained after an empty thinking block.

        Raises ChatError if the server refuses, does not answer, or answers with something else.
        """
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "chat_template_kwargs": {"enable_thinking": enable_thinking},
            **extra,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(  # noqa: S310 - the caller's server
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:  # noqa: S310
                reply = json.load(response)
        except urllib.error.HTTPError as error:
            # Redact before truncating: half a secret would no longer be recognized.
            message = redact(error.read(_ERROR_READ).decode(errors="replace"))[:_ERROR_SHOWN]
            raise ChatError(f"refused the request: {error.code} {message}") from error
        except _FAILURES as error:
            raise ChatError(f"did not answer: {error}") from error
        if not (isinstance(reply, dict) and reply.get("choices")):
            message = redact(json.dumps(reply))[:_ERROR_SHOWN]
            raise ChatError(f"answered with something other than a chat completion: {message}")
        return reply


def text_part(text: str) -> ContentPart:
    return {"type": "text", "text": text}


def image_part(data: bytes) -> ContentPart:
    """An image part with a PNG or JPEG file as a data URL."""
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
