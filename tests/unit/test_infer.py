"""The answer of `job infer` as it is written."""

import json
from pathlib import Path

import torch

from job.evaluation.lengths import UNKNOWN
from job.infer import Stream, _longest
from job.manifest import StageRecord
from job.outputs import STAGES
from job.spec.load import load_spec
from job.stages import Stages
from tests.jobs import ROOT


def streamed(pieces: list[bytes]) -> list[str]:
    """What is written of tokens that stand for these bytes, and when."""
    written: list[str] = []
    decode = lambda tokens: b"".join(pieces[t] for t in tokens).decode(errors="replace")  # noqa: E731
    stream = Stream(decode, written.append)
    stream.put(torch.tensor([[7, 8, 9]]))  # the prompt
    for token in range(len(pieces)):
        stream.put(torch.tensor([token]))
    stream.end()
    return written


def test_each_token_is_written_as_it_comes_and_the_prompt_never() -> None:
    assert streamed([b"x", b"^", b"{2}"]) == ["x", "^", "{2}", ""]


def test_space_is_written_only_between_words() -> None:
    assert "".join(streamed([b"\n", b"a", b" ", b"b", b" \n"])) == "a b"


def test_half_a_character_waits_for_the_other_half() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert streamed([b"a", first, second]) == ["a", "", "é", ""]


def test_a_half_that_stays_one_is_written_at_the_end() -> None:
    assert "".join(streamed([b"a", b"\xc3"])) == "a\ufffd"


def test_an_answer_may_be_as_long_as_those_of_the_run_s_evaluation(tmp_path: Path) -> None:
    text = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
    stages = Stages(load_spec(text, "latex.yaml", [f"output.uri={tmp_path}"], {}), "infer")
    assert _longest(stages) == UNKNOWN
    record = StageRecord(
        name="eval", fingerprint="f", started="", seconds=1, files=(),
        summary={"max_new_tokens": 77},
    )  # fmt: skip
    (tmp_path / STAGES).mkdir()
    (tmp_path / STAGES / "eval.json").write_text(json.dumps(record.to_json()))
    assert _longest(stages) == 77
