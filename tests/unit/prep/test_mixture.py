"""Several sources to train on: how many rows of each, in which order, and what is told of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError
from job.pipeline import runner
from job.prep import mixture
from job.prep.discovery import find_source
from job.prep.prepare import prepare
from job.prep.prepared_data import PreparedData
from job.spec.load import load_spec
from job.spec.types import DataSpec
from job.storage.digests import digest_tree
from tests.unit.prep.test_prep import data_spec, inputs, png, write_jsonl

SIZES = {"a": 40, "b": 10}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name, size in SIZES.items():
        for n in range(size):
            (tmp_path / "data" / f"{name}{n}.png").write_bytes(png(30 + n, 20 + ord(name) % 9))
        rows = [{"image": f"{name}{n}.png", "text": f"{name}_{{{n}}}"} for n in range(size)]
        write_jsonl(tmp_path / "data", rows, f"{name}.jsonl")
    return tmp_path / "data"


def mixed(folder: Path, *weights: float | None, **settings: Any) -> DataSpec:
    spec = data_spec(Path("x"), eval_fraction=0.3, **settings)
    train = (
        replace(spec.train[0], uri=str(folder / f"{name}.jsonl"), weight=weight)
        for name, weight in zip(SIZES, weights, strict=True)
    )
    return replace(spec, train=tuple(train))


def run(spec: DataSpec, place: Path) -> PreparedData:
    sources = [find_source(source, field) for field, source in spec.sources().items()]
    evaluation = sources.pop() if spec.eval else None
    return prepare(inputs(spec, sources, evaluation), place / "p" / "data")


def letters(data: PreparedData, split: Any = "train") -> str:
    """The sources of the rows in their order: `aaba…`."""
    return "".join(row.answer[0] for row in data.rows(split))


def stats(place: Path) -> Any:
    return json.loads((place / "p" / "data" / "stats.json").read_text())


@pytest.mark.parametrize(
    ("rows", "weights", "strategy", "expected"),
    [
        ([40, 10], [None, None], "first_exhausted", [40, 10]),
        ([40, 10], [1, 1], "first_exhausted", [10, 10]),
        ([40, 10], [1, 1], "all_exhausted", [40, 40]),
        ([40, 10], [0.7, 0.3], "first_exhausted", [23, 10]),
        ([40, 10], [8, 1], "first_exhausted", [40, 5]),
        ([40, 10, 7], [0.1, 0.2, 0.7], "first_exhausted", [1, 2, 7]),
        ([40, 10, 7], [0.1, 0.2, 0.7], "all_exhausted", [40, 80, 280]),
        ([40, 0], [1, 1], "all_exhausted", [0, 0]),
        ([3, 1_000_000], [0.1, 0.3], "all_exhausted", [333_333, 1_000_000]),
    ],
)
def test_shares_are_those_of_the_weights(
    rows: list[int], weights: list[Any], strategy: str, expected: list[int]
) -> None:
    assert mixture.epoch_rows(rows, weights, strategy) == expected


def test_every_stretch_of_a_mixture_holds_each_source_by_its_share() -> None:
    numbers = mixture.interleave([40, 10, 7], [40, 80, 280])
    assert len(numbers) == 400
    for start in range(0, 400, 20):
        part = numbers[start : start + 20]
        found = [((part >= low) & (part < high)).sum() for low, high in ((0, 40), (40, 50))]
        assert abs(found[0] - 2) <= 1
        assert abs(found[1] - 4) <= 1
    repeats = Counter(numbers.tolist())
    assert [{repeats[n] for n in range(*span)} for span in ((40, 50), (50, 57))] == [{8}, {40}]


def test_sources_without_weights_train_every_row_once(folder: Path, tmp_path: Path) -> None:
    data = run(mixed(folder, None, None), tmp_path)
    assert data.train_rows + data.eval_rows == 50
    answers = [row.answer for split in ("train", "eval") for row in data.rows(split)]
    assert len(set(answers)) == 50
    assert "b" in letters(data)[:8], "they stand among each other, not one after the other"
    assert set(letters(data, "eval")[:6]) == {"a", "b"}, "the first rows are those evaluated"


def test_weights_decide_how_many_rows_of_each_source_train(folder: Path, tmp_path: Path) -> None:
    data = run(mixed(folder, 1, 1), tmp_path)
    [a, b] = stats(tmp_path)["sources"]
    assert Counter(letters(data)) == {"a": b["rows"], "b": b["rows"]}
    assert data.train_rows == len(data.rows("train")) == 2 * b["rows"]
    assert a == {
        "source": "data.train[0]",
        "uri": str(folder / "a.jsonl"),
        "weight": 1,
        "rows": 40 - a["held_out"],
        "trained": b["rows"],
        "held_out": letters(data, "eval").count("a"),
    }
    again = run(mixed(folder, 1, 1, stopping_strategy="all_exhausted"), tmp_path / "all")
    assert Counter(letters(again)) == {"a": a["rows"], "b": a["rows"]}
    assert len({row.id for row in again.rows("train")}) == a["rows"] + b["rows"]


def test_rows_of_a_mixture_say_which_source_they_are_of(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [row.id for row in run(mixed(folder, 3, 1), tmp_path).rows("train")]
    assert {row_id.partition(".jsonl")[0] for row_id in rows} == {"train[0]/a", "train[1]/b"}
    lines = [line for line in capfd.readouterr().err.splitlines() if " data.train[" in line]
    assert len(lines) == 2
    assert "share=75" in lines[0]


def test_a_mixture_is_the_same_by_any_number_of_processes_and_twice(
    folder: Path, tmp_path: Path
) -> None:
    made = []
    for number in (1, 2):
        run(mixed(folder, 1, 2, num_proc=number), tmp_path / str(number))
        made.append([(f.path, f.sha256) for f in digest_tree(tmp_path / str(number) / "p")])
    assert made[0] == made[1]
    assert "data/train-order.npy" in {path for path, _ in made[0]}


def test_held_out_rows_are_kept_out_of_every_source(folder: Path, tmp_path: Path) -> None:
    held_out = [{"image": f"{name}3.png", "text": f"held out {name}"} for name in SIZES]
    uri = write_jsonl(folder, held_out, "held-out.jsonl")
    spec = mixed(folder, None, None)
    data = run(replace(spec, eval=replace(spec.train[0], uri=str(uri))), tmp_path)
    assert (data.leaked_rows, data.train_rows, data.eval_rows) == (2, 48, 2)
    assert [row.answer for row in data.rows("eval")] == ["held out a", "held out b"]
    assert [each["rows"] for each in stats(tmp_path)["sources"]] == [39, 9]
    assert not {"a_{3}", "b_{3}"} & {row.answer for row in data.rows("train")}


def test_every_source_is_an_input_of_the_run(folder: Path, tmp_path: Path) -> None:
    text = f"""
version: 1
name: test
model: {{model_name_or_path: "builtin://ernie-vl-tiny", init: random}}
data:
  train: [{{uri: "{folder}/a.jsonl", weight: 1}}, {{uri: "{folder}/b.jsonl", weight: 1}}]
  instruction: Read it.
output: {{uri: "{tmp_path}/out"}}
runtime: {{cache_dir: "{tmp_path}/cache"}}
"""
    record = runner.run(load_spec(text, "spec", environ={}), "prep")
    assert list(record.inputs) == ["model", "train[0]", "train[1]"]
    assert record.rows["train"] % 2 == 0
    write_jsonl(folder, [{"image": "b1.png", "text": "b_0"}] * 4, "b.jsonl")
    again = runner.run(load_spec(text, "spec", environ={}), "prep")
    assert again.rows["train"] < record.rows["train"], "it was made again"


def test_a_source_that_gives_no_row_ends_prep_and_is_named(folder: Path, tmp_path: Path) -> None:
    write_jsonl(folder, [{"image": "gone.png", "text": "x"}], "b.jsonl")
    with pytest.raises(DataError, match=r"\$\.data\.train\[1\]: has no row to train on"):
        run(mixed(folder, 1, 1, max_bad_rows=1), tmp_path)


def test_a_wrong_mapping_names_its_source(folder: Path, tmp_path: Path) -> None:
    write_jsonl(folder, [{"image": "b1.png", "latex": "x"}], "b.jsonl")
    with pytest.raises(DataError, match=r"\$\.data\.train\[1\]\.columns"):
        run(mixed(folder, 1, 1), tmp_path)
