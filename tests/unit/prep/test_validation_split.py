"""Rows to validate on during training: a split of its own, apart from the other two."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError
from job.prep import chunks, sources
from job.prep.convert import to_results
from job.prep.discovery import find_source
from job.prep.prepare import prepare
from job.prep.prepared_data import PreparedData
from job.prep.rows import Row
from job.prep.shards import SPLITS, shard_paths
from job.prep.source_check import check_source
from job.prep.split_counts import SplitCounts, count_splits
from job.prep.streaming import FullShards
from job.spec.types import DataSpec
from job.storage.digests import digest_tree
from tests.unit.prep.test_prep import data_spec, folder, inputs, pair, write_jsonl

__all__ = ["folder"]


def run(spec: DataSpec, place: Path, **more: Any) -> PreparedData:
    """Prep of every source that the spec names."""
    found = {path: find_source(source, path) for path, source in spec.sources().items()}
    evaluation, validation = found.pop("$.data.eval", None), found.pop("$.data.validation", None)
    made = inputs(spec, list(found.values()), evaluation, validation=validation, **more)
    return prepare(made, place / "data")


def named(spec: DataSpec, **rows: Path) -> DataSpec:
    """The spec with sources for `eval` and `validation`."""
    found: Any = {n: replace(spec.train[0], uri=str(path)) for n, path in rows.items()}
    return replace(spec, **found)


def answers(data: PreparedData) -> dict[str, list[str]]:
    return {split: [row.answer for row in data.rows(split)] for split in SPLITS}


def stats(data: PreparedData) -> Any:
    return json.loads((data.directory / "stats.json").read_text())


def test_a_fraction_to_validate_on_leaves_the_rows_to_evaluate_on_as_they_are(
    folder: Path, tmp_path: Path
) -> None:
    rows = write_jsonl(folder, [pair(n % 24, text=f"x_{{{n}}}") for n in range(120)])
    spec = data_spec(rows, eval_fraction=0.2, leakage_by="image_and_answer")
    without = run(spec, tmp_path / "without")
    data = run(replace(spec, validation_fraction=0.2), tmp_path / "with")
    assert without.validation is None
    assert not shard_paths(without.directory, "validation")
    assert answers(data)["eval"] == [row.answer for row in without.rows("eval")]
    assert data.validation is not None
    assert data.validation_rows == len(data.validation) > 0


@pytest.mark.parametrize("named_eval", [False, True])
def test_no_row_is_in_two_splits(folder: Path, tmp_path: Path, named_eval: bool) -> None:
    twice = [pair(n) for n in range(40)] * 2
    spec = data_spec(write_jsonl(folder, twice), eval_fraction=0.25, validation_fraction=0.25)
    if named_eval:
        spec = named(spec, eval=write_jsonl(folder, [pair(n) for n in range(8)], "eval.jsonl"))
    data = run(spec, tmp_path)
    found = {split: {*texts} for split, texts in answers(data).items()}
    assert all(found.values())
    assert not found["train"] & found["eval"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["eval"]
    assert {*Counter(answers(data)["validation"]).values()} == {2}  # copies stay together


def counted(spec: DataSpec, **more: Any) -> SplitCounts:
    """The splits without any preparation."""
    made = inputs(spec, [], None, **more)
    rows = dict[str, list[Row]]()
    for path, source in spec.sources().items():
        found = find_source(source, path)
        options = check_source(found, source, spec, path)
        results = to_results(list(sources.read(found, source)), options)
        rows[path] = [result for result in results if isinstance(result, Row)]
    return count_splits(
        rows, spec, normalize_label=made.normalize_label, classes=made.classes, seed=made.seed
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_fraction": 0.25, "validation_fraction": 0.25},
        {"eval_fraction": 0.2, "validation_fraction": 0.2, "leakage_by": "image_and_answer"},
        {"eval_fraction": 0.3, "leakage": "refuse", "leakage_by": "image"},
        {"validation_fraction": 0.3, "eval": "eval.jsonl"},
        {"eval_fraction": 0.3, "validation": "eval.jsonl", "leakage_by": "image_and_answer"},
    ],
)
def test_the_splits_of_a_small_source_are_counted_as_prep_will(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    write_jsonl(folder, [pair(n) for n in range(5, 12)], "eval.jsonl")
    # An image appears with two answers, and some rows twice.
    many = [pair(n % 24, text=f"x_{{{n % 40}}}") for n in range(70)]
    named_rows = {key: folder / settings.pop(key) for key in ("eval", "validation")
                  if key in settings}  # fmt: skip
    spec = named(data_spec(write_jsonl(folder, many), **settings), **named_rows)
    data, found = run(spec, tmp_path / "prepared"), counted(spec)
    assert (sum(found.train), found.evaluation, found.validation) == (
        data.train_rows,
        data.eval_rows,
        data.validation_rows or 0,
    )


@pytest.fixture
def three(folder: Path) -> DataSpec:
    """Rows 0 to 19 to train on, 18 to 23 to validate on, 22 to 25 to evaluate on."""
    rows = {
        name: write_jsonl(folder, [pair(n) for n in numbers], f"{name}.jsonl")
        for name, numbers in (
            ("train", range(20)),
            ("validation", range(18, 24)),
            ("eval", (22, 23, 0, 1)),
        )
    }
    return named(data_spec(rows["train"]), validation=rows["validation"], eval=rows["eval"])


def test_rows_of_three_sources_are_kept_apart(three: DataSpec, tmp_path: Path) -> None:
    data = run(three, tmp_path)
    assert (data.train_rows, data.validation_rows, data.eval_rows) == (16, 4, 4)
    assert (data.leaked_rows, data.leaked_validation_rows) == (4, 2)
    assert answers(data)["validation"] == [f"x_{{{n}}}" for n in range(18, 22)]
    assert answers(data)["train"] == [f"x_{{{n}}}" for n in range(2, 18)]
    assert stats(data)["leaked"] == {"rows": 4, "validation_rows": 2}
    assert stats(data)["validation"]["rows"] == 6  # as of training, before leaked ones are removed
    assert {*stats(data)["kept_apart_by"]} == {"train", "validation"}


def test_each_pair_of_splits_that_shares_rows_is_refused_by_name(
    three: DataSpec, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        run(replace(three, leakage="refuse"), tmp_path)
    assert [problem.message for problem in caught.value.problems] == [
        "4 training rows duplicate held-out rows",
        "2 validation rows duplicate rows to evaluate on",
    ]


def test_few_validation_rows_of_classes_are_compared_by_their_images(
    folder: Path, tmp_path: Path
) -> None:
    """Two rows of a class do not show that answers repeat; those of training do."""
    kinds = ("cat", "dog", "cow")
    rows = {
        name: write_jsonl(folder, [pair(n, text=kinds[n % 3]) for n in numbers], f"{name}.jsonl")
        for name, numbers in (("t", range(15)), ("v", range(14, 20)), ("e", range(19, 24)))
    }
    data = run(named(data_spec(rows["t"]), validation=rows["v"], eval=rows["e"]), tmp_path)
    assert (data.leaked_rows, data.leaked_validation_rows) == (1, 1)
    assert Counter(answers(data)["validation"]) == {"cow": 2, "cat": 2, "dog": 1}


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"validation_fraction": 1e-9}, "validation_fraction", "leaves no row to validate on"),
        (
            {"validation_fraction": 0.5, "eval_fraction": 0.4999999},
            "eval_fraction",
            "holds out, together with data.validation_fraction, all 24 rows, leaving none",
        ),
    ],
)
def test_a_fraction_that_leaves_a_split_empty_is_named(
    folder: Path, tmp_path: Path, settings: dict[str, Any], field: str, message: str
) -> None:
    rows = write_jsonl(folder, [pair(n) for n in range(24)])
    with pytest.raises(DataError) as caught:
        run(data_spec(rows, **{"eval_fraction": 0.3, **settings}), tmp_path)
    [problem] = caught.value.problems
    assert problem.field == f"$.data.{field}"
    assert message in problem.message
    assert f"data.{field}" in str(problem.fix)


def test_validation_rows_that_are_all_evaluated_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = write_jsonl(folder, [pair(n) for n in range(12)])
    few = write_jsonl(folder, [pair(n) for n in (12, 13)], "few.jsonl")
    with pytest.raises(DataError) as caught:
        run(named(data_spec(rows), eval=few, validation=few), tmp_path)
    assert caught.value.problems[0].field == "$.data.validation"
    assert caught.value.problems[0].message == "all 2 rows duplicate rows to evaluate on"


def test_training_rows_that_are_all_validated_are_refused_with_rows_to_change(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_jsonl(folder, [pair(n) for n in range(12)])
    few = write_jsonl(folder, [pair(n) for n in (12, 13)], "few.jsonl")
    with pytest.raises(DataError, match="all 12 rows duplicate held-out rows") as caught:
        run(named(data_spec(rows), eval=few, validation=rows), tmp_path)
    fix = "evaluate and validate on rows that are not trained on"
    assert str(caught.value.problems[0].fix).startswith(fix)
    assert fix in capsys.readouterr().err


def test_bad_validation_rows_count_as_bad_rows(folder: Path, tmp_path: Path) -> None:
    rows = write_jsonl(folder, [pair(n) for n in range(12)])
    bad = write_jsonl(folder, [pair(20), {"image": "none.png", "text": "x"}], "validation.jsonl")
    spec = replace(named(data_spec(rows), validation=bad), eval_fraction=0.3)
    with pytest.raises(DataError, match=r"(?s)1 of 14 rows cannot.*validation.jsonl:2"):
        run(spec, tmp_path / "refused")
    data = run(replace(spec, max_bad_rows=1), tmp_path / "allowed")
    assert (data.rejected_rows, data.validation_rows) == (1, 1)


def test_a_mixture_validates_on_each_source_and_streams_only_training_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "ROWS", 4)
    paths = [
        write_jsonl(folder, [pair(n) for n in numbers], name)
        for name, numbers in (("a.jsonl", range(14)), ("b.jsonl", range(14, 40)))
    ]
    spec = data_spec(paths[0], eval_fraction=0.2, validation_fraction=0.3)
    spec = replace(spec, train=tuple(replace(spec.train[0], uri=str(path)) for path in paths))
    stored = run(spec, tmp_path / "stored")
    shares = stats(stored)["sources"]
    assert sum(share["validation"] for share in shares) == stored.validation_rows
    assert all(share["validation"] for share in shares)

    spec = replace(spec, streaming=True)
    streamed = run(spec, tmp_path / "streamed")
    found = [find_source(source, "$.data.train") for source in spec.train]
    full = FullShards.of(spec, found, streamed.directory, tmp_path / "full")
    streamed = replace(streamed, full_shards=full)
    for split in SPLITS:
        assert records(streamed.rows(split)) == records(stored.rows(split))


def records(rows: Any) -> list[dict[str, Any]]:
    return [row.to_record() for row in rows if isinstance(row, Row)]


def test_prep_that_was_interrupted_ends_with_the_same_three_splits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, three: DataSpec
) -> None:
    monkeypatch.setattr(chunks, "ROWS", 3)
    whole = run(three, tmp_path / "whole")
    convert, converted = chunks.convert_chunk, []

    def stopping(task: chunks.SourceTask, number: int, records: list[chunks.Record]) -> None:
        if task.split == "validation" and number == 1 and "stopped" not in converted:
            converted.append("stopped")
            raise KeyboardInterrupt
        convert(task, number, records)
        converted.append(f"{task.split}{number}")

    monkeypatch.setattr(chunks, "convert_chunk", stopping)
    spec = replace(three, num_proc=1)
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "again")
    again = run(spec, tmp_path / "again")
    assert converted[converted.index("stopped") :] == ["stopped", "validation1"]
    assert digest_tree(again.directory) == digest_tree(whole.directory)
