"""Prep of many rows: the same result by any number of processes, each chunk made once."""

import io
import json
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from job.errors import DataError
from job.prep import chunks
from job.prep.dedup import count_near_duplicates, difference_hash
from job.prep.discovery import find_source
from job.prep.prepare import prepare
from job.prep.prepared_data import PreparedData
from job.spec.types import DataSpec
from job.storage.digests import digest_tree
from tests.jobs import ROOT
from tests.unit.prep.test_prep import data_spec, inputs, pair, png, run, write_jsonl


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for n in range(100):
        (folder / "images" / f"{n}.png").write_bytes(png(40 + n))
    monkeypatch.setattr(chunks, "ROWS", 16)
    return write_jsonl(folder, [*[pair(n) for n in range(100)], pair(900), pair(7)])


def made(directory: Path) -> list[Any]:
    return [(file.path, file.sha256) for file in digest_tree(directory)]


def test_any_number_of_processes_leaves_the_same_bytes(rows: Path, tmp_path: Path) -> None:
    spec = data_spec(rows, eval_fraction=0.3, max_bad_rows=1)
    run(replace(spec, num_proc=1), tmp_path / "one")
    run(replace(spec, num_proc=2), tmp_path / "two")
    found = made(tmp_path / "one" / "prepared")
    assert found == made(tmp_path / "two" / "prepared")
    assert sum(path.startswith("train-") for path, _ in found) == 7
    assert not list(tmp_path.glob("*.partial"))


def test_a_chunk_ends_by_its_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "BYTES", 100)
    every = (chunks.Record(id=str(n), base="", line=b"x" * 40) for n in range(7))
    assert [len(chunk) for chunk in chunks.split_into_chunks(every)] == [3, 3, 1]


SLOW = """
import sys, time
from pathlib import Path
from job.prep import chunks
from tests.unit.prep.test_prep_scale import *
chunks.ROWS = 16
convert = chunks.convert_chunk
def slowly(task, number, records):
    convert(task, number, records)
    print(number, flush=True)
    if number == 3:
        time.sleep(600)
chunks.convert_chunk = slowly
run(data_spec(Path(sys.argv[1]), eval_fraction=0.3, max_bad_rows=1, num_proc=1), Path(sys.argv[2]))
"""


def test_a_killed_prep_goes_on_and_leaves_the_bytes_of_one_that_was_not(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "killed"
    place.mkdir()
    command = [sys.executable, "-c", SLOW, str(rows), str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != b"3":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    [partial] = tmp_path.glob("killed.partial")
    (partial / "train-00005.partial").write_bytes(b"half a shard")
    done = [path.stat().st_mtime_ns for path in sorted(partial.glob("train-0000[0-3].arrow"))]
    assert len(done) == 4
    made_again: list[int] = []
    convert = chunks.convert_chunk

    def noted(task: chunks.SourceTask, number: int, records: list[chunks.Record]) -> None:
        made_again.append(number)
        convert(task, number, records)

    monkeypatch.setattr(chunks, "convert_chunk", noted)
    spec = data_spec(rows, eval_fraction=0.3, max_bad_rows=1, num_proc=1)
    data = run(spec, place)
    assert made_again == [4, 5, 6]
    assert data.rejected_rows == 1
    run(spec, tmp_path / "whole")
    assert made(place / "prepared") == made(tmp_path / "whole" / "prepared")


def test_what_was_made_of_other_rows_is_not_taken_over(rows: Path, tmp_path: Path) -> None:
    spec = data_spec(rows, eval_fraction=0.3, max_bad_rows=1)
    partial = tmp_path / "p.partial"
    partial.mkdir()
    (partial / "identity").write_text("of something else")
    (partial / "train-00000.json").write_text("{}")
    assert run(spec, tmp_path / "p").train_rows > 50


def test_a_worker_that_dies_does_not_hang_the_job(rows: Path, tmp_path: Path) -> None:
    spec = data_spec(rows, eval_fraction=0.3, max_bad_rows=1, num_proc=2)
    source = find_source(spec.train[0], "$.data.train")
    with pytest.raises(BrokenProcessPool):
        prepare(inputs(spec, [source], normalize_label=die), tmp_path / "x" / "y")


def die(label: str) -> str:
    os._exit(9)


def with_eval(rows: Path, **settings: Any) -> DataSpec:
    held_out = write_jsonl(rows.parent, [pair(n) for n in (3, 4)], "eval.jsonl")
    spec = data_spec(rows, max_bad_rows=1, **settings)
    return replace(spec, eval=replace(spec.train[0], uri=str(held_out)))


def prepared(spec: DataSpec, tmp_path: Path) -> PreparedData:
    assert spec.eval is not None
    first, second = (find_source(s, "$.data") for s in (*spec.train, spec.eval))
    return prepare(inputs(spec, [first], second), tmp_path / "a" / "data")


def test_leakage_is_removed_or_refused_as_the_spec_says(rows: Path, tmp_path: Path) -> None:
    data = prepared(with_eval(rows), tmp_path)
    assert (data.leaked_rows, data.train_rows, len(data.rows("train"))) == (2, 99, 99)
    with pytest.raises(DataError, match=r"data\.leakage.*2 training rows duplicate"):
        prepared(with_eval(rows, leakage="refuse"), tmp_path)


YES_OR_NO = [("Is it red?", "yes"), ("Is it red?", "no"), ("Is it round?", "yes")]


def asked(number: int, question: str, answer: str) -> dict[str, Any]:
    return {**pair(number), "question": question, "text": answer}


def test_an_answer_counts_with_its_question(rows: Path, tmp_path: Path) -> None:
    spec = with_eval(rows)
    assert spec.eval is not None
    train = write_jsonl(rows.parent, [asked(n, *YES_OR_NO[n % 3]) for n in range(9)], "asked.jsonl")
    held = write_jsonl(rows.parent, [asked(20, *YES_OR_NO[0])], "asked-of-others.jsonl")
    spec = replace(
        spec,
        train=(replace(spec.train[0], uri=str(train)),),
        eval=replace(spec.eval, uri=str(held)),
    )
    data = prepared(replace(spec, leakage_by="image_and_answer"), tmp_path / "both")
    assert (data.leaked_rows, data.train_rows) == (3, 6)
    for by in ("image", "auto"):  # the answers repeat
        data = prepared(replace(spec, leakage_by=by), tmp_path / by)
        assert (data.leaked_rows, data.train_rows) == (0, 9)


def test_the_image_decides_the_split_if_it_alone_is_compared(rows: Path, tmp_path: Path) -> None:
    """Classes would fall on one side whole, by their few labels."""
    source = write_jsonl(
        rows.parent, [{**pair(n), "text": "ab"[n % 2]} for n in range(60)], "classes.jsonl"
    )
    spec = data_spec(source, eval_fraction=0.3, leakage_by="image")
    data = run(spec, tmp_path)
    sides = [{row.answer for row in data.rows(split)} for split in ("train", "eval")]
    assert sides == [{"a", "b"}, {"a", "b"}]
    assert data.leaked_rows == 0


def test_a_training_set_that_is_all_held_out_is_refused(rows: Path, tmp_path: Path) -> None:
    spec = with_eval(rows)
    assert spec.eval is not None
    with pytest.raises(DataError, match="all 2 rows duplicate"):
        prepared(replace(spec, train=(spec.eval,)), tmp_path)


def test_statistics_tell_histograms_duplicates_and_rejects(rows: Path, tmp_path: Path) -> None:
    run(data_spec(rows, eval_fraction=0.3, max_bad_rows=1), tmp_path)
    stats = json.loads((tmp_path / "prepared" / "stats.json").read_text())
    assert stats["duplicates"]["exact_rows"] == 1
    assert stats["duplicates"]["near_images"] == 100, "white images look the same at any size"
    assert stats["rejected"]["rows"] == 1
    both = [stats["train"], stats["eval"]]
    assert sum(s["image_pixels"]["histogram"].get("512-1023", 0) for s in both) == 13
    assert sum(sum(s["answer_characters"]["histogram"].values()) for s in both) == 101


def drawn(text: str) -> Image.Image:
    image = Image.new("RGB", (400, 80), "white")
    ImageDraw.Draw(image).text((20, 20), text, fill="black", font=ImageFont.load_default(32))
    return image


def test_images_that_look_the_same_are_found_in_another_size_and_format() -> None:
    first, other = drawn("x^2 + 5y = 3"), drawn("a_n + b = z/7")
    file = io.BytesIO()
    first.resize((600, 120)).save(file, "JPEG", quality=80)
    again = Image.open(io.BytesIO(file.getvalue()))
    hashes = [difference_hash(image) for image in (first, other, again)]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (5000, 32), dtype=np.uint8)
    assert count_near_duplicates(noise) == 0
    every = np.concatenate([noise, np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)])
    assert count_near_duplicates(every) == 1


def test_ten_rows_are_drawn_on_a_contact_sheet(rows: Path, tmp_path: Path) -> None:
    run(data_spec(rows, eval_fraction=0.3, max_bad_rows=1), tmp_path)
    with Image.open(tmp_path / "prepared" / "contact_sheet.png") as sheet:
        assert sheet.size == (920, 5 * (12 + 150 + 3 * 15 + 6))  # a name, a question, an answer


def test_progress_goes_on_by_chunks_with_rate_and_time_left(
    rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(data_spec(rows, eval_fraction=0.3, max_bad_rows=1), tmp_path)
    [line] = [line for line in capfd.readouterr().err.splitlines() if "prep train" in line]
    assert "done=102/102" in line
    assert "rows/s" in line
    assert "left=0.0s" in line
