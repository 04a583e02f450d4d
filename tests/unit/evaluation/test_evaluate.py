"""Evaluation of the tiny model: conversations, and the limit on answer lengths."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job import families
from job.evaluation import answer_lengths
from job.evaluation import evaluate as evaluation
from job.evaluation.evaluate import evaluate
from job.evaluation.prompts import questions
from job.prep.rows import Message, Part, Row
from job.spec.load import load_spec
from job.spec.types import EvalSpec
from tests.jobs import ROOT
from tests.reports import png

TINY = ROOT / "job" / "families" / "builtin" / "ernie-vl-tiny"
TEXT = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
SPEC = load_spec(TEXT, "latex.yaml", environ={}).spec


@pytest.fixture(scope="module")
def family() -> families.Family:
    return families.bind(families.read_checkpoint(str(TINY), TINY), SPEC.model, SPEC.data)


@pytest.fixture(scope="module")
def model(family: families.Family) -> Any:
    return family.load(dtype=torch.float32, device=torch.device("cpu"))


def eval_spec(**settings: Any) -> EvalSpec:
    text = "\n".join(f"  {key}: {json.dumps(value)}" for key, value in settings.items())
    head = TEXT.partition("\neval:")[0]
    tail = "output:" + TEXT.partition("\noutput:")[2]
    return load_spec(f"{head}\neval:\n{text}\n{tail}", "spec", environ={}).spec.eval


def message(role: Any, *parts: int | str) -> Message:
    return Message(
        role=role,
        parts=tuple(Part(image=p) if isinstance(p, int) else Part(text=p) for p in parts),
    )


def chat(name: str = "chat", *, second: str = "no") -> Row:
    """A conversation of two images and two answers, the second image in the second question."""
    return Row(
        id=name,
        messages=(
            message("system", "Be brief."),
            message("user", 0, "What is it?"),
            message("assistant", "x"),
            message("user", 1, "Is it the same?"),
            message("assistant", second),
        ),
        images=(png(1, (56, 28)), png(2, (56, 28))),
    )


# --- turns -------------------------------------------------------------------------------------


def test_every_answer_is_asked_with_the_true_conversation_before_it() -> None:
    first, second = questions([chat()], "all")
    assert [(q.turn, q.label, len(q.asked)) for q in (first, second)] == [(1, "x", 2), (2, "no", 4)]
    assert [turn["role"] for turn in second.to_json()] == ["system", "user", "assistant", "user"]
    assert second.to_json()[3]["content"] == [
        {"type": "image", "image": 1},
        {"type": "text", "text": "Is it the same?"},
    ]
    assert [q.turn for q in questions([chat()], "last")] == [2]


def test_an_earlier_answer_that_is_empty_asks_nothing() -> None:
    row = chat()
    silent = replace(
        row, messages=(*row.messages[:2], message("assistant", " "), *row.messages[3:])
    )
    assert [q.turn for q in questions([silent], "all")] == [2]


def test_a_conversation_is_judged_by_all_its_answers_and_says_so(
    model: Any, family: families.Family, tmp_path: Path
) -> None:
    spec = eval_spec(generation={"max_new_tokens": 4})
    rows = [chat("one"), chat("two")]
    found = evaluate(model, family, rows, spec, batch_size=3, label="test")
    assert (found.metrics["rows"], found.metrics["answers"]) == (2, 4)
    assert [(p.id, p.row, p.turn) for p in found.predictions] == [
        ("one", 0, 1), ("one", 0, 2), ("two", 1, 1), ("two", 1, 2),
    ]  # fmt: skip
    assert (found.summary()["turns"], found.summary()["answers"]) == ("all", 4)
    evaluation.write(found, tmp_path, "final", "predictions.jsonl")
    lines = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["asked"]) for line in lines] == [2, 4, 2, 4]
    last = evaluate(model, family, rows, replace(spec, turns="last"), batch_size=3, label="test")
    assert [p.turn for p in last.predictions] == [2, 2]
    assert "answers" not in last.metrics
    assert last.metrics["loss"] == pytest.approx(found.metrics["loss"])  # of whole conversations


def test_metrics_of_formulas_keep_their_names(model: Any, family: families.Family) -> None:
    spec = eval_spec(answer="latex", turns="last")
    found = evaluate(model, family, [chat()], spec, batch_size=1, label="test")
    assert list(found.metrics) == [
        "loss", "rows", "exact_match", "exact_match_normalized", "cer", "token_edit_distance",
        "bleu", "render_match", "render_skipped", "render_failed",
    ]  # fmt: skip


# --- lengths -----------------------------------------------------------------------------------


def test_auto_leaves_room_beyond_the_longest_label() -> None:
    generation = eval_spec(turns="all").generation
    assert generation.max_new_tokens == "auto"
    assert answer_lengths.limit(generation, [10, 400]) == 400 + 100 + 16
    thinking = replace(generation, enable_thinking=True)
    assert answer_lengths.limit(thinking, [400]) == 516 + 2048
    assert answer_lengths.limit(replace(generation, max_new_tokens=7), [400]) == 7
    assert answer_lengths.limit(generation, []) == answer_lengths.DEFAULT


def test_a_limit_below_the_labels_is_told_before_a_token_is_written(
    model: Any, family: families.Family, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("long", second="y" * 60), chat("short")]
    spec = eval_spec(generation={"max_new_tokens": 20}, turns="last")
    found = evaluate(model, family, rows, spec, batch_size=2, label="test")
    said = capsys.readouterr().err
    assert "cannot_be_right=1/2" in said
    assert "longest_label=60" in said
    assert said.index("cannot_be_right") < said.index("test done")
    assert found.summary()["cannot_be_right"] == 1
    auto = replace(spec, generation=replace(spec.generation, max_new_tokens="auto"))
    found = evaluate(model, family, rows, auto, batch_size=2, label="test")
    assert "cannot_be_right" not in capsys.readouterr().err
    assert found.max_new_tokens == 60 + 15 + 16


def test_answers_that_reach_the_limit_are_counted_and_marked(
    model: Any, family: families.Family
) -> None:
    from job.prep.formulas import samples

    formulas = [
        Row(
            id=str(n),
            messages=(message("user", 0, SPEC.data.question or ""), message("assistant", s.latex)),
            images=(png_of(s.png),),
        )
        for n, s in enumerate(samples(replace(SPEC.data.train[0].formulas, max_tokens=12), 6, 1))
    ]
    one = eval_spec(answer="latex", generation={"max_new_tokens": 1})
    found = evaluate(model, family, formulas, one, batch_size=6, label="test")
    assert found.summary()["cut_short"] == 6
    assert all(p.cut_short for p in found.predictions)
    free = replace(one, generation=replace(one.generation, max_new_tokens=200))
    found = evaluate(model, family, formulas, free, batch_size=6, label="test")
    assert found.summary()["cut_short"] < 6


def png_of(data: bytes) -> Any:
    from job.prep.images import inspect

    return inspect(data)


# --- labels that are not what the spec says ----------------------------------------------------


def test_labels_that_are_no_json_are_told_of_by_a_row(
    model: Any, family: families.Family, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = eval_spec(answer="json", generation={"max_new_tokens": 2})
    found = evaluate(model, family, [chat(second="7")], spec, batch_size=2, label="test")
    assert "labels=1/2 first=chat" in capsys.readouterr().err
    assert found.metrics["labels_not_json"] == 1
    assert found.metrics["valid_json"] in (0, 1)
