"""`job ask` against an OpenAI-compatible HTTP server that stands in for vLLM."""

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from job.cli.ask import ask
from job.errors import InputError
from tests.jobs import Finished, job


class Server(HTTPServer):
    """Answers `answer`, after a number of health checks that fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Any = {"choices": [{"message": {"content": " x^{2} \n"}}]}
        self.status, self.starting = 200, 0
        self.asked: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.starting -= 1
        self._reply(503 if self.server.starting >= 0 else 200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body), self.headers["Authorization"]))
        self._reply(self.server.status, self.server.answer)

    def _reply(self, status: int, content: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_the_answer_to_a_drawn_formula(server: Server) -> None:
    assert ask(f"{server.url}/", "latex", "What is this?", None) == "x^{2}"
    [(path, body, key)] = server.asked
    assert (path, body["model"], key) == ("/v1/chat/completions", "latex", None)
    image, question = body["messages"][0]["content"]
    assert question == {"type": "text", "text": "What is this?"}
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert min(shown.size) > 10


CONTROL = "\x1b]8;;https://h\x1b\\x\x9b2J\u202e"
SECRET = "hf_plantedHubToken0123456789"


def asked(url: str) -> Finished:
    environ = {"HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1"}
    return job("ask", url, "--model=m", "--question=x", "--no-image", environ=environ)


def test_the_token_for_the_hub_stays_here_and_offline_mode_is_about_the_hub(server: Server) -> None:
    assert asked(server.url).code == 0
    [(_, body, key)] = server.asked
    assert key is None
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "max_tokens": 256,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_an_answer_steers_no_terminal_and_repeats_no_secret(server: Server) -> None:
    content = f"a{CONTROL} {SECRET}\n\tb"
    server.answer = {"choices": [{"message": {"content": content}}]}
    done = asked(server.url)
    assert done.code == 0, done.err
    assert done.out == ("a\\x1b]8;;https://h\\x1b\\x\\x9b2J\\u202e ${HF_TOKEN}\n\tb\n")


@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_error_of_a_server_steers_no_terminal_and_repeats_no_secret(
    server: Server, status: int
) -> None:
    # Cut at 500 bytes it would show the first half of the secret.
    server.status, server.answer = status, {"x" * 470: f"{SECRET} {CONTROL}"}
    done = asked(server.url)
    assert done.code == 12, done.err
    assert "planted" not in done.err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.err), done.err


def test_a_question_without_an_image(server: Server) -> None:
    assert ask(server.url, "text", "What is this?", None, with_image=False) == "x^{2}"
    [(_, body, _)] = server.asked
    assert body["messages"][0]["content"] == [{"type": "text", "text": "What is this?"}]


def test_a_system_prompt_comes_first(server: Server) -> None:
    ask(server.url, "text", "What is this?", None, system="Be brief.", with_image=False)
    [(_, body, _)] = server.asked
    said = [(each["role"], each["content"][0]["text"]) for each in body["messages"]]
    assert said == [("system", "Be brief."), ("user", "What is this?")]


def test_a_model_trained_with_thoughts_is_asked_for_them(server: Server) -> None:
    done = job("ask", server.url, "--model=m", "--question=x", "--no-image", "--enable-thinking")
    assert done.code == 0, done.err
    [(_, body, _)] = server.asked
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert body["max_tokens"] == 256 + 2048


def test_an_image_of_ones_own(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg")
    ask(server.url, "latex", "?", tmp_path / "a.jpg")
    [(_, body, key)] = server.asked
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert key == "Bearer sesame"


def test_it_waits_for_a_server_that_is_starting(server: Server) -> None:
    server.starting = 2
    with pytest.raises(InputError, match="not ready"):
        ask(server.url, "latex", "?", None)
    assert ask(server.url, "latex", "?", None, wait=20) == "x^{2}"


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (404, {"error": "no such model"}, "refused the request: 404 .*no such model"),
        (200, {"choices": [{"message": {"content": ""}}]}, "answer is empty"),
        (200, {"choices": []}, "other than a chat completion"),
    ],
)
def test_what_is_no_answer_is_an_error(
    server: Server, status: int, answer: Any, message: str
) -> None:
    server.status, server.answer = status, answer
    with pytest.raises(InputError, match=message):
        ask(server.url, "latex", "?", None)


def test_an_address_needs_its_protocol() -> None:
    with pytest.raises(InputError, match="http"):
        ask("localhost:8000", "latex", "?", None)


def test_a_missing_image_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--image"):
        ask(server.url, "latex", "?", tmp_path / "none.png")
