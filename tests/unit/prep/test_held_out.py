"""Which rows are held out and what leaks, by the kind of answers; classes that a split lacks."""

import csv
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from job.errors import DataError, SpecError
from job.evaluation.answer_kinds import NORMALIZERS
from job.prep.contact_sheet import contact_sheet
from job.prep.discovery import find_source
from job.prep.prepare import PrepInputs, prepare
from job.prep.prepared_data import PreparedData
from job.spec.answer_kinds import Answer
from job.spec.load import load_spec
from job.spec.types import DataSpec

SPEC = """
version: 1
name: test
model: {{model_name_or_path: "builtin://ernie-vl-tiny"}}
data: {{train: {{uri: "{uri}"}}, instruction: "What is it?", num_proc: 1}}
output: {{uri: out}}
"""


def image(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (40, 30), random.Random(seed).randbytes(3600)).save(path)
    return str(path.relative_to(path.parents[1]))


def rows(folder: Path, texts: list[str], name: str = "rows", first: int = 0) -> Path:
    """A list of images of noise with these texts."""
    lines = [
        {"image": image(folder / "images" / f"{first + n}.png", first + n), "text": text}
        for n, text in enumerate(texts)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def prepared(
    train: Path, folder: Path, *, answer: Answer = "text", held_out: Path | None = None, **data: Any
) -> PreparedData:
    spec: DataSpec = load_spec(SPEC.format(uri=train), "spec", environ={}).spec.data
    evaluation = None
    if held_out is not None:
        data["eval"] = replace(spec.train[0], uri=str(held_out))
        evaluation = find_source(data["eval"], "$.data.eval")
    inputs = PrepInputs(
        spec=replace(spec, **data),
        train=(find_source(spec.train[0], "$.data.train"),),
        evaluation=evaluation,
        seed=3407,
        normalize_label=NORMALIZERS[answer],
        classes=answer == "label",
    )
    return prepare(inputs, folder / "made" / "data")


def answers(data: PreparedData, split: Any) -> list[str]:
    return [row.answer for row in data.rows(split)]


# --- leakage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "held_out", "leaked"),
    [
        ("text", "NewYork {}", 0),
        ("text", "New  York {} ", 6),
        ("latex", "NewYork {}", 6),
        ("json", '{{"a": "12 {}"}}', 0),
    ],
)
def test_rows_leak_where_answers_are_the_same_by_their_kind(
    tmp_path: Path, answer: Answer, held_out: str, leaked: int
) -> None:
    template = '{{"a": "12{}"}}' if answer == "json" else "New York {}"
    train = rows(tmp_path, [template.format(n) for n in range(8)])
    judged = rows(tmp_path, [held_out.format(n) for n in range(6)], "held", 100)
    data = prepared(train, tmp_path, answer=answer, held_out=judged)
    assert (data.leaked_rows, data.train_rows) == (leaked, 8 - leaked)


def test_an_object_leaks_however_its_keys_are_ordered(tmp_path: Path) -> None:
    train = rows(tmp_path, ['{"a": 1, "b": 2}', '{"a": 5, "b": 2}'])
    judged = rows(tmp_path, ['{"b":2.0,"a":1}'], "held", 100)
    assert prepared(train, tmp_path, answer="json", held_out=judged).leaked_rows == 1


# --- classes -----------------------------------------------------------------------------------


def classes(count: int) -> list[str]:
    return [("invoice", "receipt", "letter", "form")[n % 4] for n in range(count)]


@pytest.mark.parametrize("answer", ["label", "text"])
def test_a_table_of_classes_is_split_within_each_class(tmp_path: Path, answer: Answer) -> None:
    data = prepared(rows(tmp_path, classes(80)), tmp_path, answer=answer, eval_fraction=0.2)
    train, held_out = Counter(answers(data, "train")), Counter(answers(data, "eval"))
    assert data.leaked_rows == 0
    assert train.total() + held_out.total() == 80
    assert set(train) == set(held_out) == set(classes(4))
    stats = json.loads((data.directory / "stats.json").read_text())
    assert stats["kept_apart_by"] == {"train": "image"}


def test_classes_stay_on_their_side_when_rows_are_appended(tmp_path: Path) -> None:
    few = prepared(rows(tmp_path, classes(40)), tmp_path / "a", answer="label")
    many = prepared(rows(tmp_path, classes(80)), tmp_path / "b", answer="label")
    before = {row.images[0].data for row in few.rows("eval")}
    after = {row.images[0].data for row in many.rows("eval")}
    assert before == after & {
        row.images[0].data for split in ("train", "eval") for row in few.rows(split)
    }


def test_one_image_of_a_class_that_is_there_twice_stays_on_one_side(tmp_path: Path) -> None:
    path = rows(tmp_path, classes(40))
    path.write_text(path.read_text() * 2)
    data = prepared(path, tmp_path, answer="label", eval_fraction=0.3)
    shown = [{row.images[0].data for row in data.rows(split)} for split in ("train", "eval")]
    assert not shown[0] & shown[1]
    assert data.leaked_rows == 0


def test_answers_that_do_not_repeat_still_keep_rows_apart(tmp_path: Path) -> None:
    texts = [f"{n // 2}" for n in range(60)]  # each there twice, with two images
    data = prepared(rows(tmp_path, texts), tmp_path, eval_fraction=0.3)
    assert not set(answers(data, "train")) & set(answers(data, "eval"))
    assert data.leaked_rows == 0
    assert data.train_rows + data.eval_rows == 60


def test_held_out_rows_of_classes_leave_the_training_rows_alone(tmp_path: Path) -> None:
    train, judged = rows(tmp_path, classes(40)), rows(tmp_path, classes(8), "held", 100)
    data = prepared(train, tmp_path, answer="label", held_out=judged)
    assert (data.train_rows, data.eval_rows, data.leaked_rows) == (40, 8, 0)


def test_a_class_that_cannot_be_learned_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = rows(tmp_path, classes(40))
    judged = rows(tmp_path, [*classes(4), "passport"], "held", 100)
    prepared(train, tmp_path, answer="label", held_out=judged)
    assert "have no training rows" in (err := capsys.readouterr().err)
    assert "classes=passport" in err


def test_a_class_that_is_not_judged_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = rows(tmp_path, classes(40))
    judged = rows(tmp_path, ["invoice"] * 4, "held", 100)
    prepared(train, tmp_path, answer="label", held_out=judged)
    assert 'classes="form, letter, receipt"' in capsys.readouterr().err


def talks(folder: Path, name: str) -> Path:
    """Rows without images, the same under each name."""
    path = folder / f"{name}.jsonl"
    said = ({"question": f"q{n}", "answer": f"a{n}"} for n in range(6))
    path.write_text("".join(json.dumps(line) + "\n" for line in said), encoding="utf-8")
    return path


@pytest.mark.parametrize("leakage", ["remove", "refuse"])
def test_leaked_rows_lead_to_the_images_only_where_these_tell_them_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], leakage: Any
) -> None:
    answers_shared = rows(tmp_path, ["a", "b"]), rows(tmp_path, ["a", "b"], "held", 100)
    images_shared = rows(tmp_path, ["a", "b"], "same"), rows(tmp_path, ["c", "d"], "held_same")
    without = talks(tmp_path, "talks"), talks(tmp_path, "held_talks")
    for (train, held), by, helps in (
        (answers_shared, "image_and_answer", True),
        (images_shared, "image", False),
        (without, "image_and_answer", False),
    ):
        with pytest.raises(DataError) as caught:
            prepared(
                train, tmp_path, held_out=held, leakage_by=by, leakage=leakage, text_only=not helps
            )
        message = str(caught.value) + capsys.readouterr().err
        assert ("leakage_by" in message) is helps, message
    train, held = answers_shared
    prepared(train, tmp_path, held_out=held, leakage_by="image", leakage=leakage)


def test_classes_held_out_whole_lead_to_the_key_that_helps(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepared(
            rows(tmp_path, classes(40)),
            tmp_path,
            leakage_by="image_and_answer",
            eval_fraction=0.001,
        )
    [problem] = caught.value.problems
    assert problem.field == "$.data.eval_fraction"
    assert str(problem.fix).startswith("set data.leakage_by: image")


def test_a_fraction_that_leaves_nothing_to_train_on_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)eval_fraction.*none to train on.*lower"):
        prepared(rows(tmp_path, ["a", "b"]), tmp_path, eval_fraction=0.9999)


def test_a_label_may_not_hold_out_classes_whole() -> None:
    with pytest.raises(SpecError, match=r"data\.leakage_by: must be auto or image"):
        load_spec(
            SPEC.format(uri="rows.csv"), "spec",
            ["eval.answer=label", "data.leakage_by=image_and_answer"], {},
        )  # fmt: skip


# --- what is seen of them ----------------------------------------------------------------------


def test_a_contact_sheet_shows_every_image_and_the_whole_conversation(tmp_path: Path) -> None:
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "image", "image": image(tmp_path / "images" / "a.png", 1)},
                {"type": "image", "image": image(tmp_path / "images" / "b.png", 2)},
                {"type": "text", "text": "Which?"}]},
            {"role": "assistant", "content": "the first"},
            {"role": "user", "content": "why?"},
            {"role": "assistant", "content": "so"},
        ]
    }  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**chat, "id": n}) + "\n" for n in range(3)))
    data = prepared(path, tmp_path, held_out=rows(tmp_path, ["x"], "held", 9))
    [row, *_] = data.rows("train")
    short = replace(row, messages=row.messages[1:3], images=row.images[:1])
    short = replace(short, messages=(replace(short.messages[0], parts=short.messages[0].parts[::2]),
                                     short.messages[1]))  # fmt: skip
    sizes: list[tuple[int, int]] = []
    for number, each in enumerate((short, row)):
        contact_sheet([each], tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as sheet:
            found = sheet.convert("RGB").getcolors(2**20) or []
            sizes.append((sheet.height, len(found)))
    (height, colours), (taller, more) = sizes
    assert taller >= height + 3 * 15  # a line for each turn more
    assert more > 1.5 * colours  # noise of the second image


def test_a_csv_of_labels_from_a_spreadsheet_is_prepared(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text"])
        writer.writerows(
            [image(tmp_path / "img" / f"{n}.png", n), text] for n, text in enumerate(classes(80))
        )
    data = prepared(path, tmp_path, answer="label")
    assert data.eval_rows > 0
    assert set(answers(data, "train")) == set(classes(4))
