"""`job init`: the spec that it writes for rows of each shape, and what it asks and refuses."""

import csv
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from job.drafting import DraftOptions, job_name, make_draft, spec_text
from job.errors import DataError, InputError, JobError, UsageError
from job.evaluation.answer_kinds import NORMALIZERS
from job.prep.discovery import find_source
from job.prep.prepare import PrepInputs, prepare
from job.prep.prepared_data import PreparedData
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests.jobs import ROOT, Finished, job

TOY = "builtin://ernie-vl-tiny"


def picture(path: Path) -> str:
    """Noise, another in each file; returns the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (60, 30), random.Random(path.name).randbytes(5400)).save(path)
    return path.name


def listed(folder: Path, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    """A list of rows; values that end in `.png` are drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        for value in row.values():
            if str(value).endswith(".png"):
                picture(folder / value)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def text_of(uri: Path, **options: Any) -> str:
    settings = {"instruction": None, "answer": None, "model": TOY, "output_uri": "out"}
    made = DraftOptions(uri=str(uri), name="drafted", **{**settings, **options})
    return spec_text(make_draft(made), "drafted.yaml")


def spec_of(uri: Path, **options: Any) -> JobSpec:
    return load_spec(text_of(uri, **options), "drafted.yaml", environ={}).spec


def refusal(uri: Path, **options: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        spec_of(uri, **options)
    return caught.value


def receipts(folder: Path, count: int = 60) -> Path:
    objects = [json.dumps({"shop": "Coop", "total": n}) for n in range(count)]
    return listed(folder, [{"file": f"{n}.png", "ground_truth": o} for n, o in enumerate(objects)])


def prepared(folder: Path, place: Path, *, max_bad_rows: int = 0, **options: Any) -> PreparedData:
    """Prep of the spec that is written for the folder."""
    spec = spec_of(folder, **options)
    made = PrepInputs(
        spec=replace(spec.data, max_bad_rows=max_bad_rows),
        train=(find_source(spec.data.train[0], "$.data.train"),),
        evaluation=None,
        seed=spec.train.seed,
        normalize_label=NORMALIZERS[spec.eval.answer],
        classes=spec.eval.answer == "label",
    )
    return prepare(made, place / "prepared" / "data")


def test_columns_with_unusual_names_and_json_are_recognized_and_named(tmp_path: Path) -> None:
    spec = spec_of(receipts(tmp_path / "receipts"), instruction="Read it as JSON.")
    columns = spec.data.train[0].columns
    assert (columns.image, columns.text) == ("file", "ground_truth")
    assert spec.eval.answer == "json"
    assert spec.eval.generation.max_new_tokens == "auto"
    assert (spec.data.eval_fraction, spec.data.validation_fraction) == (0.15, 0.2)
    assert (spec.train.eval_strategy, spec.train.load_best_model_at_end) == ("epoch", True)


def test_what_is_written_prepares_with_no_split_empty(tmp_path: Path) -> None:
    folder = receipts(tmp_path / "receipts")
    data = prepared(folder, tmp_path, instruction="Read it as JSON.")
    assert data.train_rows >= 0.7 * 60
    assert min(data.eval_rows, data.validation_rows or 0) >= 8
    text = text_of(folder, instruction="Read it as JSON.")
    assert f" # {data.eval_rows} rows, evaluated before and after\n" in text
    rest = f"{data.validation_rows} others, to choose a step by; {data.train_rows} are trained on"
    assert f" # {rest}\n" in text


def test_a_few_copies_and_bad_rows_do_not_make_the_written_numbers_wrong(tmp_path: Path) -> None:
    rows = [{"image": f"{n % 40}.png", "text": f"number {n % 45}"} for n in range(60)]
    folder = listed(tmp_path / "rows", [*rows, {"image": "60.png", "text": ""}])
    data = prepared(folder, tmp_path, instruction="Read it.", max_bad_rows=1)
    assert data.leaked_rows > 0
    assert f"; {data.train_rows} are trained on\n" in text_of(folder, instruction="Read it.")


def test_every_split_has_a_row_of_each_class_where_rows_suffice(tmp_path: Path) -> None:
    names = ["cat", "dog", "cow"] * 20
    labels = [{"image": f"{n}.png", "text": name} for n, name in enumerate(names)]
    folder = listed(tmp_path / "animals", [*labels, {"image": "60.png", "text": "emu"}])
    data = prepared(folder, tmp_path, instruction="Which?")
    for split in ("train", "eval", "validation"):
        assert {"cat", "dog", "cow"} <= {row.answer for row in data.rows(split)}
    assert "too few rows to be in every split: emu." in text_of(folder, instruction="Which?")


def test_a_toy_takes_enough_steps_to_learn_something_and_a_real_model_is_not_overtrained(
    tmp_path: Path,
) -> None:
    folder = receipts(tmp_path / "receipts")
    toy = text_of(folder, instruction="Read it.")
    epochs = load_spec(toy, "x", environ={}).spec.train.num_train_epochs
    assert f"  num_train_epochs: {epochs:g} # 308 steps\n" in toy
    assert "The toy learns little in fewer than 300 steps." in toy
    real = text_of(folder, instruction="Read it.", model="hf://org/model")
    assert "  num_train_epochs: 3 # 33 steps\n" in real
    assert "# If answers are not right yet, raise this first" in real


@pytest.mark.parametrize(
    ("answers", "kind", "reason"),
    [
        (["cat", "dog", "cow"] * 6, "label", "18 sampled rows share 3 answers: cat, dog, cow"),
        ([f"x^{{{n}}}" for n in range(18)], "latex", "all 18 sampled answers have LaTeX commands"),
        ([f"It says {n} here." for n in range(18)], "text", "neither JSON, nor LaTeX"),
        (["12", "13"] * 9, "label", "2 answers"),
        ([f'{{"a": {n}}}' for n in range(17)] + ["none"], "json", "17 of 18 sampled ones are JSON"),
    ],
)
def test_the_kind_of_answers_is_guessed_with_its_reason(
    tmp_path: Path, answers: list[str], kind: str, reason: str
) -> None:
    folder = listed(tmp_path, [{"image": f"{n}.png", "text": t} for n, t in enumerate(answers)])
    text = text_of(folder, instruction="What is it?")
    assert load_spec(text, "x", environ={}).spec.eval.answer == kind
    assert reason in " ".join(text.replace("#", "").split())


def test_a_folder_of_images_with_their_texts_needs_no_columns(tmp_path: Path) -> None:
    for n in range(12):
        picture(tmp_path / "captions" / f"{n}.png")
        (tmp_path / "captions" / f"{n}.txt").write_text(f"number {n}")
    spec = spec_of(tmp_path / "captions", instruction="Read it.")
    assert {*vars(spec.data.train[0].columns).values()} == {None}
    assert spec.data.eval_fraction > 0
    assert spec.data.validation_fraction == 0  # too few rows


def test_splits_that_file_names_show_become_the_three_sources(tmp_path: Path) -> None:
    for name, count in (("train", 12), ("validation", 4), ("test", 4)):
        rows = [{"image": f"{name}{n}.png", "text": f"{name} {n}"} for n in range(count)]
        listed(tmp_path, rows, f"{name}.jsonl")
    data = spec_of(tmp_path, instruction="Read it.").data
    assert data.eval is not None
    assert data.validation is not None
    sources = (data.train[0], data.validation, data.eval)
    assert [source.split for source in sources] == ["train", "validation", "test"]


def test_rows_of_text_are_trained_as_text_and_conversations_are_found(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chats = spec_of(listed(tmp_path / "a", [{"dialog": turns, "n": n} for n in range(20)]))
    assert chats.data.text_only
    assert chats.data.train[0].columns.messages == "dialog"
    asked = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(20)]
    assert spec_of(listed(tmp_path / "b", asked)).data.instruction is None


def test_lengths_are_those_of_the_models_tokenizer_if_it_is_here(tmp_path: Path) -> None:
    folder = listed(tmp_path, [{"question": "a", "answer": "word " * n} for n in range(300, 320)])
    near = text_of(folder)
    assert "the tokenizer of builtin://ernie-vl-tiny" in " ".join(near.replace("#", "").split())
    far = text_of(folder, model="hf://org/model")
    assert "estimated by characters" in " ".join(far.replace("#", "").split())
    assert "1,595 characters" in far
    assert "characters" not in near
    for text in (near, far):
        assert load_spec(text, "x", environ={}).spec.train.max_length >= 512


def test_words_of_the_user_are_written_so_that_they_are_read_back(tmp_path: Path) -> None:
    folder = receipts(tmp_path / "a ${HOME} # b: c")
    question = 'What: "is" #1?\n${HOME} [ü]'
    spec = spec_of(folder, instruction=question)
    assert spec.data.instruction == question
    assert spec.data.train[0].uri == str(folder)


# --- asked and refused -------------------------------------------------------------------------


def test_what_rows_do_not_tell_is_asked(tmp_path: Path) -> None:
    folder = listed(
        tmp_path, [{"image": f"{n}.png", "text": f"t{n}", "label": "ab"[n % 2]} for n in range(20)]
    )
    asked: list[str] = []

    def ask(question: str, proposal: str) -> str:
        asked.append(proposal)
        return proposal

    def choose(question: str, choices: Sequence[str]) -> str:
        asked.append(question.rpartition("\n")[2])
        return choices[1]

    spec = spec_of(folder, ask=ask, choose=choose)
    assert asked == ["Which column is the answer?", "Which of these is it: a, b?"]
    assert spec.data.train[0].columns.text == "label"
    assert spec.data.instruction == "Which of these is it: a, b?"


@pytest.mark.parametrize(
    ("row", "field", "fix"),
    [
        ({"image": "0.png", "text": "a"}, "--instruction", "What does the image say?"),
        ({"image": "0.png", "text": "a", "label": "b"}, "--text-column", "text, label"),
        ({"image": "0.png", "x": "a", "y": "b"}, "--text-column", "x, y"),
        ({"before": "0.png", "after": "1.png", "text": "a"}, "--image-column", "before, after"),
        ({"image": "0.png", "after": "1.png", "text": "a"}, "--image-column", "image, after"),
    ],
)
def test_without_a_terminal_the_option_is_named(
    tmp_path: Path, row: dict[str, str], field: str, fix: str
) -> None:
    error = refusal(listed(tmp_path, [row, row]))
    assert isinstance(error, UsageError)
    assert error.problems[0].field == field
    assert fix in str(error.problems[0].fix)


def test_wrong_values_of_options_are_named_by_their_options(tmp_path: Path) -> None:
    folder = listed(tmp_path, [{"question": "a", "answer": "b"}] * 2)
    error = refusal(folder, model="builtin://ernie-tiny", output_uri="s3:/out")
    assert isinstance(error, UsageError)
    assert {problem.field for problem in error.problems} == {"--model", "--output-uri"}
    assert (
        refusal(folder, columns={"text": "anser"}).problems[0].fix == "write --text-column answer"
    )
    missing = refusal(folder, model=str(tmp_path / "none"))
    assert (missing.exit_code, missing.problems[0].field) == (12, "--model")


def test_images_without_texts_lead_to_a_list_of_their_folders(tmp_path: Path) -> None:
    for n in range(12):
        picture(tmp_path / "animals" / ("cat", "dog")[n % 2] / f"{n}.png")
    error = refusal(tmp_path / "animals")
    assert isinstance(error, DataError)
    assert "cat, dog" in error.problems[0].message
    command = str(error.problems[0].fix).partition(": ")[2]
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path / "animals")
    spec = spec_of(tmp_path / "animals", instruction="Which animal?")
    assert spec.eval.answer == "label"


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([], InputError, "is no file, nor a folder with files"),
        ([{"text": "a"}] * 3, DataError, "rows have neither an image nor a question"),
        ([{"question": "a", "answer": "b"}], DataError, "has a single row"),
        ([{"image": "x/../../0.png", "text": "a"}] * 2, DataError, "leaves the folder"),
    ],
)
def test_data_that_makes_no_rows_is_refused(
    tmp_path: Path, rows: list[dict[str, str]], kind: type[JobError], message: str
) -> None:
    folder = tmp_path / "rows"
    if rows:
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = refusal(folder, instruction="Read it.")
    assert isinstance(error, kind)
    assert message in error.problems[0].message
    assert error.problems[0].fix


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("data/receipts/train.jsonl", "receipts"),
        ("s3://bucket/My Formulas/data/train-00000-of-00002.parquet", "my-formulas"),
        ("hf://datasets/unsloth/LaTeX_OCR/data/train-*.parquet", "latex-ocr"),
        ("rows.csv", "rows"),
        ("list", "list"),
        ("data/train-00000-of-00002.parquet", "data"),
        ("收据/*.jsonl", "my-job"),
        ("../cats.tar.gz", "cats"),
    ],
)
def test_a_job_is_named_after_its_data(uri: str, name: str) -> None:
    assert job_name(uri) == name


# --- the command -------------------------------------------------------------------------------


def init(folder: Path, *arguments: str) -> Finished:
    return job("init", str(folder), "-o", str(folder.parent / "spec.yaml"), *arguments)


def test_the_command_writes_a_valid_spec_once_and_without_torch(tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    listed(folder, [{"image": f"{n}.png"} for n in range(30)], "unused.txt")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"]])
        csv.writer(file).writerows([f"{n}.png", "abc"[n % 3]] for n in range(30))
    path = tmp_path / "spec.yaml"
    code = f"""
import sys
sys.argv = ["job", "init", {str(folder)!r}, "-o", {str(path)!r}, "--instruction", "Which?"]
try:
    from job.cli.app import main
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert not {{"torch", "transformers"}} & {{*sys.modules}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    written = path.read_text()
    assert load_spec(written, "spec.yaml", environ={}).spec.eval.answer == "label"

    again = init(folder, "--instruction", "What?")
    assert (again.code, "exists already" in again.err) == (2, True)
    assert path.read_text() == written
    assert init(folder, "--instruction", "What?", "--force").code == 0
    assert "instruction: What?" in path.read_text()
