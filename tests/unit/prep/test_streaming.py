"""Rows that prep stores without image bytes: read again, the same rows, within a disk limit."""

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError
from job.prep import chunks
from job.prep.discovery import find_source
from job.prep.prepared_data import PreparedData
from job.prep.rows import Row
from job.prep.shards import Rows
from job.prep.streaming import FullShards, StreamedRows
from job.spec.types import DataSpec
from job.train.prefetch import PrefetchingBatchSampler, ShardPrefetcher
from job.train.sampler import BlockShuffleSampler, DistributedBatchSampler
from tests.unit.prep.test_prep import data_spec, pair, png, run, with_source, write_jsonl
from tests.unit.prep.test_sources import KINDS, folder, image_bytes, kept_as, plain, text_of

__all__ = ["folder"]
SMALL = 3  # records of a chunk


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "ROWS", SMALL)


def streamed(spec: DataSpec, place: Path) -> tuple[PreparedData, StreamedRows]:
    """Prep of the spec with `streaming`, and the rows to train as training has them."""
    spec = replace(spec, streaming=True, num_proc=1)
    data = run(spec, place)
    sources = [find_source(source, "$.data.train") for source in spec.train]
    full_shards = FullShards.of(spec, sources, data.directory, place / "full_shards")
    data = replace(data, full_shards=full_shards)
    rows = data.rows("train")
    assert isinstance(rows, StreamedRows)
    return data, rows


def known(rows: StreamedRows) -> Rows:
    """What prep keeps of the rows."""
    return Rows.of(rows.full_shards.directory, "train")


def same(found: list[Row], kept: list[Row]) -> bool:
    return [row.to_record() for row in found] == [row.to_record() for row in kept]


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_rows_are_those_that_are_kept(
    kind: str, where: str, folder: Path, tmp_path: Path
) -> None:
    spec = kept_as(kind, where, folder, tmp_path, eval_fraction=0.3, num_proc=1)
    kept = run(spec, tmp_path / "kept")
    data, rows = streamed(spec, tmp_path / "streamed")
    assert len(rows) == len(kept.rows("train")) > SMALL
    # Backwards, so that every shard is entered in the middle of the source.
    found = [rows[number] for number in range(len(rows) - 1, -1, -1)][::-1]
    assert same(found, list(kept.rows("train")))
    assert same(list(data.rows("eval")), list(kept.rows("eval")))
    assert data.train_rows == kept.train_rows


def test_prep_stores_all_but_the_bytes_of_the_images(folder: Path, tmp_path: Path) -> None:
    spec = replace(data_spec(write_jsonl(folder, plain())), eval_fraction=0.3)
    kept = run(spec, tmp_path / "kept")
    data, _ = streamed(spec, tmp_path / "streamed")
    for row, whole in zip(data.measured_rows(), kept.rows("train"), strict=True):
        assert same([row], [whole.without_image_bytes()])
    every = b"".join(path.read_bytes() for path in data.directory.glob("train-*"))
    assert b"PNG" not in every
    assert (data.directory / "contact_sheet.png").stat().st_size > 1000
    assert not (data.directory / chunks.SAMPLE).exists()
    name = "stats.json"
    assert (data.directory / name).read_text() == (kept.directory / name).read_text()


def test_leaked_refused_and_chosen_rows_are_left_out_as_ever(folder: Path, tmp_path: Path) -> None:
    gone = [{"image": "images/99.png", "text": "gone"}, {"image": "images/0.png", "text": ""}]
    rows = [*plain()[:5], *gone, *plain()[5:], {"image": "images/3.png", "text": "again"}]
    spec = replace(data_spec(write_jsonl(folder, rows)), eval_fraction=0.3, max_bad_rows=2)
    for settings in ({}, {"limit": 9}, {"limit": 9, "shuffle_seed": 5}):
        chosen = with_source(spec, **settings)
        kept = run(chosen, tmp_path / f"kept{len(settings)}")
        data, found = streamed(chosen, tmp_path / f"streamed{len(settings)}")
        assert same(list(found), list(kept.rows("train"))), settings
        assert data.leaked_rows == kept.leaked_rows


def test_formulas_are_drawn_again(tmp_path: Path) -> None:
    spec = replace(
        with_source(data_spec(Path("x")), uri="builtin://formulas", limit=10), eval_fraction=0.3
    )
    kept = run(spec, tmp_path / "kept")
    _, rows = streamed(spec, tmp_path / "streamed")
    assert same([rows[n] for n in (4, 1)], [kept.rows("train")[n] for n in (4, 1)])


def test_a_mixture_is_streamed_in_its_order(folder: Path, tmp_path: Path) -> None:
    spec = data_spec(write_jsonl(folder, plain()[:8], "a.jsonl"))
    other = replace(spec.train[0], uri=str(write_jsonl(folder, plain()[8:], "b.jsonl")))
    mixed = replace(
        spec,
        train=(replace(spec.train[0], weight=1.0), replace(other, weight=1.0)),
        stopping_strategy="all_exhausted",
        eval_fraction=0.2,
    )
    kept = run(mixed, tmp_path / "kept")
    _, rows = streamed(mixed, tmp_path / "streamed")
    assert len(rows) == len(kept.rows("train")) > 8
    assert same(list(rows), list(kept.rows("train")))
    assert rows.blocks()[0] == 0


def test_the_disk_holds_no_more_shards_than_the_buffer_needs(tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    for n in range(90):
        (tmp_path / "data" / "images" / f"{n}.png").write_bytes(png(40 + n))
    listed = write_jsonl(tmp_path / "data", [pair(n) for n in range(90)])
    spec = replace(data_spec(listed), eval_fraction=0.1, shuffle_buffer_size=6)
    data, rows = streamed(spec, tmp_path / "streamed")
    full_shards = rows.full_shards
    most = 0
    windows = BlockShuffleSampler(len(rows), rows.blocks(), 6, seed=1)
    for number in windows:
        assert rows[number].images[0].data
        most = max(most, len(list(full_shards.folder.glob("*.arrow"))))
    assert most == full_shards.capacity < len(full_shards.chunks) / 2
    assert data.train_rows == len(rows)


def test_an_image_that_changed_ends_the_job_and_names_the_row(folder: Path, tmp_path: Path) -> None:
    spec = replace(data_spec(write_jsonl(folder, plain())), eval_fraction=0.3)
    _, rows = streamed(spec, tmp_path)
    (folder / "images" / f"{number_of(rows[4])}.png").write_bytes(image_bytes(99))
    with pytest.raises(DataError, match="has changed since the rows were prepared") as error:
        fresh(rows)[4]
    assert error.value.problems[0].field == known(rows)[4].id
    (folder / "images" / f"{number_of(rows[4])}.png").unlink()
    with pytest.raises(DataError, match=r"a row near it is rejected now: No such file"):
        fresh(rows)[4]


def number_of(row: Row) -> int:
    return [text_of(n) for n in range(99)].index(row.answer)


def fresh(rows: StreamedRows) -> StreamedRows:
    """The same rows where nothing has been read again yet."""
    return StreamedRows(replace(rows.full_shards, folder=rows.full_shards.folder / "fresh"))


def ask(rows: StreamedRows, numbers: list[int], answers: Any) -> None:
    answers.put([rows[number].answer for number in numbers])


def test_processes_share_what_is_read_again(folder: Path, tmp_path: Path) -> None:
    spec = replace(data_spec(write_jsonl(folder, plain())), eval_fraction=0.3)
    _, rows = streamed(spec, tmp_path)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    numbers = list(range(len(rows)))
    started = [context.Process(target=ask, args=(rows, numbers, answers)) for _ in range(3)]
    for process in started:
        process.start()
    found = [answers.get(timeout=60) for _ in started]
    for process in started:
        process.join()
    assert found == [[known(rows)[number].answer for number in numbers]] * 3
    assert not list(rows.full_shards.folder.glob("*.partial"))


def test_a_tar_is_entered_at_the_row_and_not_read_from_its_beginning(
    folder: Path, tmp_path: Path
) -> None:
    archive = KINDS["webdataset"](folder)
    spec = replace(data_spec(archive), eval_fraction=0.3)
    _, rows = streamed(spec, tmp_path)
    with archive.open("r+b") as file:  # whoever reads from the beginning meets no header
        file.write(b"\1" * 257 + b"ustar" + b"\1" * 250)
    last = len(rows) - 1
    assert rows[last].answer == known(rows)[last].answer
    with pytest.raises(DataError, match="not a readable tar"):
        rows[0]


def test_what_training_comes_to_is_fetched_before(folder: Path, tmp_path: Path) -> None:
    spec = replace(data_spec(write_jsonl(folder, plain())), eval_fraction=0.3)
    _, rows = streamed(spec, tmp_path)
    batches = DistributedBatchSampler(BlockShuffleSampler(len(rows), rows.blocks(), 3, seed=1), 2)
    wanted = list(batches)
    ahead = PrefetchingBatchSampler(batches, rows, tuple(range(len(rows))), 4)
    assert len(ahead) == len(wanted)
    assert list(ahead) == wanted
    made: set[str] = set()
    end = time.monotonic() + 60
    with ShardPrefetcher(rows.full_shards) as fetcher:
        fetcher.request(rows.shard_of(number) for number in range(len(rows)))
        while made != set(rows.full_shards.chunks) and time.monotonic() < end:
            time.sleep(0.05)
            made = {path.name for path in rows.full_shards.folder.glob("*.arrow")}
    assert made == set(rows.full_shards.chunks)


def test_the_notes_of_chunks_are_lines_of_json(folder: Path, tmp_path: Path) -> None:
    spec = replace(data_spec(write_jsonl(folder, plain())), eval_fraction=0.3)
    data, _ = streamed(spec, tmp_path)
    lines = [json.loads(line) for line in (data.directory / "chunks.jsonl").open()]
    assert [line["first"]["number"] for line in lines] == list(range(0, 12, SMALL))
