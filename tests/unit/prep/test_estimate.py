"""The records of large lists are estimated from the first of them; those of small ones counted."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from job.prep import discovery, sources
from job.prep.readers import estimate, tables
from job.prep.source_files import DataSource
from job.spec.types import SourceSpec
from tests.unit.prep.test_prep import data_spec

ROWS = 6000


def rows() -> Iterator[dict[str, str]]:
    """Rows of many lengths, in no order of length; some text takes several bytes a character."""
    for number in range(ROWS):
        yield {"image": f"{number}.png", "text": "α" * (number * 37 % 101 + 1)}


def jsonl() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()).encode()


def items() -> bytes:
    return json.dumps(list(rows()), indent=4).encode()


def delimited(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ("image", "text"), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows())
    return file.getvalue().encode()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, row in enumerate(rows()):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = len(row["text"].encode())
            archive.addfile(member, io.BytesIO(row["text"].encode()))
    return file.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "jsonl": jsonl,
    "json": items,
    "csv": lambda: delimited(","),
    "tsv": lambda: delimited("\t"),
    "jsonl.gz": lambda: gzip.compress(jsonl()),
    "csv.gz": lambda: gzip.compress(delimited(",")),
    "tar": tar,
}


def source(uri: Path, limit: int | None = None) -> tuple[DataSource, SourceSpec]:
    [spec] = data_spec(uri).train
    return discovery.find_source(spec, "$.data.train"), replace(spec, limit=limit)


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers the limits, so that small files count as large."""
    monkeypatch.setattr(sources, "MAX_COUNTED_BYTES", 0)
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 2**14)


@pytest.mark.parametrize("name", FORMATS)
def test_records_of_a_large_list_are_estimated_from_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / f"rows.{name}").write_bytes(FORMATS[name]())
    found, spec = source(tmp_path / f"rows.{name}")
    assert sources.estimate_count(found, spec) == (ROWS, True)
    monkeypatch.setattr(sources, "MAX_COUNTED_BYTES", 0)
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 2**14)
    records, exact = sources.estimate_count(found, spec)
    assert not exact
    assert records == pytest.approx(ROWS, rel=0.1)


@pytest.mark.usefixtures("small_sample")
def test_files_of_one_source_are_looked_at_until_the_sample_is_full(tmp_path: Path) -> None:
    lines = jsonl().splitlines(keepends=True)
    for number in range(6):
        part = lines[number::6]
        (tmp_path / f"{number}.jsonl").write_bytes(b"".join(part[: 10 if number == 0 else None]))
    found, spec = source(tmp_path)
    assert sources.estimate_count(found, spec)[0] == pytest.approx(5010, rel=0.1)


@pytest.mark.usefixtures("small_sample")
def test_a_limit_far_below_what_is_there_is_no_estimate(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl())
    assert sources.estimate_count(*source(tmp_path / "rows.jsonl", limit=100)) == (100, True)
    records, exact = sources.estimate_count(*source(tmp_path / "rows.jsonl", limit=ROWS - 10))
    assert (records <= ROWS - 10, exact) == (True, False)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_rows_of_an_arrow_table_are_counted_without_making_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    table = pa.Table.from_pylist(list(rows()))
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    monkeypatch.setattr(tables, "_records", lambda *_: pytest.fail("records are made"))
    assert sources.estimate_count(*source(tmp_path / "rows.arrow")) == (ROWS, True)
