"""The proof by serving, against a stand-in for vLLM with scripted answers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job import families
from job.errors import ProofError
from job.export.chat_client import ChatError
from job.export.proof import ProbeOutputs
from job.export.vllm_proof import chat_message, prove
from job.export.vllm_server import VllmServer
from job.families.ernie45_vl import Ernie45VL
from job.prep.rows import Message, Part, Row
from job.spec.load import load_spec
from tests.jobs import ROOT

PROMPT, END = (5, 6, 7), 2
ROW = Row(
    id="row",
    messages=(
        Message(role="user", parts=(Part(text="2 + 2?"),)),
        Message(role="assistant", parts=(Part(text="4"),)),
    ),
    images=(),
)
EXPECTED = ProbeOutputs(
    logits=torch.zeros(1, 8),
    answers=((3, 4, END, 0),),
    margins=((5.0, 0.01, 5.0, 0.0),),
    logprobs=((-0.1, -0.7, -0.1, 0.0),),
)


class Family:
    end_tokens = (END,)
    served_empty_thoughts = ""

    def encode_prompt(self, *row: Any, enable_thinking: bool) -> Any:
        return type("Encoded", (), {"input_ids": PROMPT})


@dataclass
class Client:
    reply: Any = None

    def complete(self, model: str, messages: Any, *, max_tokens: int, **extra: Any) -> Any:
        assert extra == {"enable_thinking": False, "logprobs": True, "return_token_ids": True}
        assert messages == [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}]
        if self.reply is None:
            raise ChatError("refused the request: 400 no")
        return self.reply


def reply(answer: tuple[int, ...], logprobs: tuple[float, ...], prompt: Any = PROMPT) -> Any:
    content = [{"logprob": each} for each in logprobs]
    choice = {"token_ids": answer, "logprobs": {"content": content}}
    return {"prompt_token_ids": prompt, "choices": [choice]}


def proven(log: Path, content: Any) -> Any:
    log.write_text("ERROR what vLLM says\n")
    client: Any = Client(content)
    family: Any = Family()
    return prove(VllmServer(client=client, log=log), family, [ROW], EXPECTED, 0.05)


def test_the_same_answer_is_proven(tmp_path: Path) -> None:
    served = proven(tmp_path / "log", reply((3, 4, END), (-0.1, -0.71, -0.1)))
    assert (served.probes, served.same_answers, served.tokens) == (1, 1, 3)
    assert served.largest_logprob_difference == pytest.approx(0.01)


def test_an_answer_may_diverge_at_a_close_choice(tmp_path: Path) -> None:
    served = proven(tmp_path / "log", reply((3, 9, END), (-0.1, -0.7, -3.0)))
    assert (served.same_answers, served.tokens) == (0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (reply((9, 4, END), (-0.1, -0.7, -0.1)), "diverges from the trained model's at token 0"),
        (
            reply((3, 4, END), (-0.1, -0.9, -0.1)),
            "differ from the trained model's by 0.2; rounding",
        ),
        (reply((3,), (-0.1,), (5, 9)), "prompt of 2 tokens is not the trained one of 3; they di"),
        ({"choices": [{}]}, "lacks token ids"),
        (None, r"row: vLLM refused the request: 400 no\nERROR what vLLM says"),
    ],
)
def test_another_answer_is_found_out(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ProofError, match=message):
        proven(tmp_path / "log", content)


def test_a_server_renders_earlier_thoughts_as_they_were_trained() -> None:
    spec = load_spec((ROOT / "specs/latex.yaml").read_text(), "spec", environ={}).spec
    tiny = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
    family = Ernie45VL.bind(families.read_checkpoint("builtin://ernie-vl-tiny", tiny), spec.data)
    question, answer = ROW.messages
    thought = replace(answer, reasoning="Two and two.")
    for earlier, name in ((answer, "empty"), (thought, "two")):
        prompt = (question, earlier, question)
        sent = [chat_message(each, (), family.served_empty_thoughts) for each in prompt]
        assert "reasoning" not in sent[0], name
        assert sent[1]["reasoning"] == sent[1]["reasoning_content"], name
        rendered = family._render_template(sent, add_generation_prompt=True)
        ids = family.encode_prompt("row", prompt, ()).input_ids
        assert rendered == family.processor.tokenizer.decode(ids), name


def test_a_row_with_thoughts_is_asked_for_them(tmp_path: Path) -> None:
    modes = list[bool]()

    class Asked:
        def complete(self, *asked: Any, enable_thinking: bool, **extra: Any) -> Any:
            modes.append(enable_thinking)
            return reply((3, 4, END), (-0.1, -0.71, -0.1))

    class Trained(Family):
        def encode_prompt(self, *row: Any, enable_thinking: bool) -> Any:
            modes.append(enable_thinking)
            return super().encode_prompt(*row, enable_thinking=enable_thinking)

    client: Any = Asked()
    family: Any = Trained()
    row = replace(ROW, messages=(*ROW.prompt, replace(ROW.messages[-1], reasoning="Two and two.")))
    prove(VllmServer(client=client, log=tmp_path / "log"), family, [row], EXPECTED, 0.05)
    assert modes == [True, True]
