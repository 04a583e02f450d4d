"""What `job infer` asks, and its answer as it is written."""

import json
from pathlib import Path

import pytest
import torch

from job.artifacts.records import STAGES, StageRecord
from job.cli.infer import AnswerStreamer, Query, _max_new_tokens, query_row
from job.errors import DataError, InputError, UsageError
from job.evaluation.answer_lengths import DEFAULT
from job.pipeline.context import RunContext
from job.spec.load import load_spec
from tests.jobs import ROOT
from tests.unit.prep.test_prep import png


def streamed(pieces: list[bytes]) -> list[str]:
    """What is written of tokens that stand for these bytes, and when."""
    written: list[str] = []
    decode = lambda tokens: b"".join(pieces[t] for t in tokens).decode(errors="replace")  # noqa: E731
    stream = AnswerStreamer(decode, written.append)
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


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, ...]:
    paths = tuple(tmp_path / f"{name}.png" for name in ("b", "a", "c"))
    for number, path in enumerate(paths):
        path.write_bytes(png(40 + number))
    return paths


def test_images_stand_in_their_order_before_the_question(images: tuple[Path, ...]) -> None:
    row = query_row(Query(images=images, question="What?", system="Be brief."), "Read.")
    assert [message.role for message in row.messages] == ["system", "user"]
    assert row.messages[0].text == "Be brief."
    assert [image.width for image in row.images] == [40, 41, 42]
    assert [part.image for part in row.messages[1].parts] == [0, 1, 2, None]
    assert row.messages[1].text == "What?"


def test_a_mark_in_the_question_says_where_an_image_stands(images: tuple[Path, ...]) -> None:
    row = query_row(Query(images=images[:2], question="From <image> to <image>?"), None)
    parts = [(part.text, part.image) for part in row.messages[0].parts]
    assert parts == [("From ", None), (None, 0), (" to ", None), (None, 1), ("?", None)]
    with pytest.raises(UsageError, match="has 2 <image> for 3 images"):
        query_row(Query(images=images, question="From <image> to <image>?"), None)


def test_without_a_question_the_instruction_is_asked_or_there_must_be_one(
    images: tuple[Path, ...],
) -> None:
    assert query_row(Query(images=images[:1]), "Read.").messages[0].text == "Read."
    for instruction in (None, ""):
        with pytest.raises(UsageError, match=r"the spec has no data\.instruction"):
            query_row(Query(images=images[:1]), instruction)
    with pytest.raises(UsageError, match="nothing is asked"):
        query_row(Query(), "Read.")


def test_every_image_that_is_missing_or_damaged_is_named(
    images: tuple[Path, ...], tmp_path: Path
) -> None:
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    names = ("gone.png", images[0], "page.png", "away.png", images[1])
    with pytest.raises(InputError) as missing:
        query_row(Query(images=tuple(tmp_path / name for name in names)), "Read.")
    found = [Path(problem.value or "").name for problem in missing.value.problems]
    assert found == ["gone.png", "away.png", "page.png"]
    with pytest.raises(DataError, match="an HTML page"):
        query_row(Query(images=(images[0], tmp_path / "page.png")), "Read.")


def test_an_answer_may_be_as_long_as_those_of_the_run_s_evaluation(tmp_path: Path) -> None:
    text = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
    stages = RunContext(load_spec(text, "latex.yaml", [f"output.uri={tmp_path}"], {}), "infer")
    assert _max_new_tokens(stages) == DEFAULT
    record = StageRecord(
        name="eval", fingerprint="f", started="", seconds=1, files=(),
        summary={"max_new_tokens": 77},
    )  # fmt: skip
    (tmp_path / STAGES).mkdir()
    (tmp_path / STAGES / "eval.json").write_text(json.dumps(record.to_json()))
    assert _max_new_tokens(stages) == 77
