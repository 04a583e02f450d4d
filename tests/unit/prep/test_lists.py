"""Lists that are not what their names say: each is read as meant, or one error with the way out."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job import log
from job.errors import DataError, InputError
from job.prep import readers
from job.prep.discovery import find_source
from job.prep.rows import Reject, Row
from tests.unit.prep.test_prep import data_spec, pair, png, run, write_jsonl
from tests.unit.prep.test_row_fields import folder, read

__all__ = ["folder"]  # the fixture

ROWS = [pair(n) for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXTS = [str(row["text"]) for row in ROWS]


def answers(found: list[Row | Reject]) -> list[str]:
    return [row.answer if isinstance(row, Row) else row.reason for row in found]


def table(*names: str, delimiter: str = ",", after: str = "\n") -> str:
    lines = [names, *((f"images/{n}.png", TEXTS[n]) for n in range(4))]
    return "".join(delimiter.join(line) + after for line in lines)


READ: dict[str, tuple[str, bytes]] = {
    "a mark of UTF-8 and lines of Windows": (
        "a.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
    "lines of JSON called .json": ("a.json", LINES.encode()),
    "NaN beside what is read": ("a.jsonl", LINES.replace("}\n", ', "score": NaN}\n').encode()),
    "semicolons, as a German Excel writes them": (
        "a.csv", b"\xef\xbb\xbf" + table("image", "text", delimiter=";", after="\r\n").encode()),
    "tabs called commas": ("a.csv", table("image", "text", delimiter="\t").encode()),
    "semicolons, packed": (
        "a.csv.gz", gzip.compress(table("image", "text", delimiter=";").encode())),
    "a space behind each comma": ("a.csv", table("image", "text", delimiter=", ").encode()),
    "a column without a name": (
        "a.csv", "".join(f"{n},{line}\n" if n else f",{line}\n" for n, line in
                         enumerate(table("image", "text").splitlines())).encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_list_is_read_as_it_is_meant(name: str, folder: Path) -> None:
    file, content = READ[name]
    (folder / file).write_bytes(content)
    assert answers(read(folder / file)) == TEXTS


@pytest.mark.parametrize("text", ["NA", "null", "None", "nan", "007", "a\u2028b\x85c"])
def test_what_looks_like_nothing_or_a_number_is_a_text_of_a_table(text: str, folder: Path) -> None:
    (folder / "a.csv").write_text(f"image,text\nimages/1.png,{text}\n", encoding="utf-8")
    assert answers(read(folder / "a.csv")) == [text]
    assert answers(read(write_jsonl(folder, [{"image": "images/1.png", "text": text}]))) == [text]


PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
REFUSED: dict[str, tuple[str, bytes, str, str]] = {
    "an array": ("a.jsonl", json.dumps(ROWS).encode(), "a.jsonl:1: is an array", "format: json"),
    "an array of many lines": (
        "a.jsonl", json.dumps(ROWS, indent=1).encode(), "begins an array", "format: json"),
    "objects of many lines": (
        "a.jsonl", PRETTY.encode(), "does not end its object", "format: json"),
    "a comma behind each line": (
        "a.jsonl", LINES.replace("}\n", "},\n").encode(), "ends with a comma", "format: json"),
    "lines of an old Macintosh": (
        "a.jsonl", LINES.replace("\n", "\r").encode(), "carriage returns", "format: json"),
    "UTF-16": ("a.jsonl", LINES.encode("utf-16"), "is UTF-16 text", "iconv -f UTF-16 "),
    "UTF-16 without its mark": (
        "a.csv", table("image", "text").encode("utf-16-le"), "is UTF-16 text", "iconv -f UTF-16LE"),
    "rows in an object": (
        "a.json", json.dumps({"version": 1, "data": ROWS}).encode(),
        "whose `data` holds 4 rows", "jq .data a.json > rows.json"),
    "columns in an object": (
        "a.json", json.dumps({"image": ["a", "b"], "text": ["c", "d"]}).encode(),
        "one object of columns, image, text", 'orient="records"'),
    "a name that stands twice": (
        "a.csv", table("image", "text", "text").encode(), "the column `text` appears twice",
        "another name"),
    "Latin-1": (
        "a.csv", "image,text\nimages/1.png,café\n".encode("latin-1"),
        "line 2 is not UTF-8 text (byte 0xe9)", "iconv -f LATIN1"),
    "a name in Latin-1": (
        "a.csv", "image,text,prüfer\n".encode("latin-1"), "column 3, which begins with 'pr'",
        "UTF-8"),
    "a Git LFS pointer": ("a.jsonl", LFS, "is a Git LFS pointer", "git lfs pull"),
    "a Git LFS pointer for a table": ("a.parquet", LFS, "is a Git LFS pointer", "git lfs pull"),
    "a Git LFS pointer for an archive": ("a.tar", LFS, "is a Git LFS pointer", "git lfs pull"),
    "a web page": ("a.jsonl", b"<!DOCTYPE html><html>", "is a web page", "download the file"),
    "a web page for a table": ("a.parquet", b"\n<html>", "is a web page", "download the file"),
    "a packed list of another name": (
        "a.jsonl", gzip.compress(LINES.encode()), "is compressed with gzip", "end in .gz"),
    "a workbook called CSV": ("a.csv", b"PK\x03\x04" + bytes(99), "Excel workbook", "as CSV"),
    "a broken line alone": ("a.jsonl", b'{"image": \n', "a.jsonl:1: unreadable line", "check"),
    "nothing": ("a.jsonl", b"", "has no readable record", "check the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_list_that_cannot_be_read_is_one_error_with_its_reason(name: str, folder: Path) -> None:
    file, content, reason, fix = REFUSED[name]
    (folder / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(folder / file)
    [problem] = caught.value.problems
    assert reason in f"{problem.field}: {problem.message}"
    assert fix in str(problem.fix)
    if fix == "format: json":
        spec = data_spec(folder / file)
        spec = replace(spec, train=(replace(spec.train[0], format="json"),))
        assert answers(read(folder / file, spec)) == TEXTS, "the fix is right to obey"


def test_a_table_called_a_list_is_told_what_it_is(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.jsonl")
    with pytest.raises(DataError, match="is a parquet file"):
        read(folder / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_stands_twice_is_a_reject(name: str, folder: Path) -> None:
    twice = '{"image": "images/1.png", "text": "first", "text": "second"}'
    (folder / name).write_text(LINES + twice + "\n" + '{"text": "x", "image": {"a": 1, "a": 2}}')
    found = answers(read(folder / name))
    assert found[:4] == TEXTS
    assert "the key `text` appears twice" in found[4]
    assert "the key `a` appears twice" in found[5]


def test_an_answer_of_another_type_is_refused_and_never_proposed(folder: Path) -> None:
    row: dict[str, Any] = {"image": "images/1.png", "question": "?", "answer": 3}
    assert answers(read(write_jsonl(folder, [row]))) == ["`answer` must be text, found int"]
    write_jsonl(folder, [{"image": "images/1.png", "question": "?", "answers": ["a", "b"]}])
    with pytest.raises(DataError) as caught:
        read(folder / "rows.jsonl")
    assert (
        caught.value.problems[0].fix == "`answers` holds lists: write one answer of a row as `text`"
    )


def test_an_image_by_url_says_what_allows_it(folder: Path) -> None:
    rows = [{"image": "https://example.com/a.png", "text": "x"}]
    assert "data.allow_image_urls: true" in answers(read(write_jsonl(folder, rows)))[0]


# --- archives ------------------------------------------------------------------------------


def archive(path: Path, name: str = "{}", **settings: Any) -> Path:
    with tarfile.open(path, "w", **settings) as file:
        for n in range(3):
            for ending, content in (("png", png(40 + n)), ("txt", f"x_{n}".encode())):
                member = tarfile.TarInfo(name.format(f"{n}.{ending}"))
                member.size, member.mtime = len(content), 1_700_000_000.25
                file.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["{}", "é{}", "a" * 120 + "{}", "d/" * 90 + "{}"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_an_archive_is_read_as_python_writes_it(form: int, name: str, folder: Path) -> None:
    path = archive(folder / "a.tar", name, format=form)
    assert answers(read(path)) == ["x_0", "x_1", "x_2"]
    [file] = find_source(data_spec(path).train[0], "x").files
    _, second, _ = readers.read(file)
    assert second.offset is not None
    begun = next(iter(readers.read(file, readers.RecordPosition(in_file=1, offset=second.offset))))
    assert begun.values == second.values, "a row is entered at its headers"


def test_headers_about_all_members_are_read_up_to_a_bound(folder: Path) -> None:
    path = archive(folder / "a.tar", format=tarfile.PAX_FORMAT, pax_headers={"comment": "y" * 999})
    assert len(read(path)) == 3
    for pax in ({"x": "y" * 2**21}, {f"x{n}": "y" * 2**19 for n in range(3)}):
        archive(path, format=tarfile.PAX_FORMAT, pax_headers=pax)
        with pytest.raises(DataError, match=r"headers of \d+ bytes"):
            read(path)


def test_headers_without_end_before_one_member_are_refused(folder: Path) -> None:
    about_all = tarfile.TarInfo.create_pax_global_header({"a": "b"})
    for kind, times in ((about_all, 3000), (_long_name(300_000), 5)):
        (folder / "a.tar").write_bytes(kind * times + archive(folder / "b.tar").read_bytes())
        with pytest.raises(DataError, match="not a readable tar"):
            read(folder / "a.tar")


def _long_name(size: int) -> bytes:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, size
    return member.tobuf(tarfile.GNU_FORMAT) + b"a" * size + bytes(-size % tarfile.BLOCKSIZE)


def add(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "a") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def test_two_images_of_one_row_of_an_archive_are_an_error(folder: Path) -> None:
    path = folder / "a.tar"
    add(path, ("1.png", png(50)), ("1.jpg", png(51)), ("1.txt", b"x"))
    with pytest.raises(DataError, match=r"no column `image`(?s:.*)image: png"):
        read(path)
    [row] = read(path, None, image="png")
    assert isinstance(row, Row)
    assert row.images[0].width == 50


def test_a_member_that_is_there_twice_is_a_reject(folder: Path) -> None:
    path = archive(folder / "a.tar")
    add(path, ("9.txt", b"old"), ("9.txt", b"new"), ("9.png", png(50)))
    assert answers(read(path))[3] == "member '9.txt' appears twice"


def test_labels_of_an_archive_are_texts_and_its_members_win_over_its_json(folder: Path) -> None:
    told = json.dumps({"image": "a.png", "text": "other", "score": 1}).encode()
    add(folder / "a.tar", ("1.json", told), ("1.png", png(50)), ("1.txt", b"x"))
    [row] = read(folder / "a.tar")
    assert isinstance(row, Row)
    assert (row.answer, row.images[0].width) == ("x", 50)
    assert set(row.ignored) == {"json.text", "score", "json.image"}
    add(folder / "b.tar", ("1.png", png(50)), ("1.cls", b"cat\n"))
    assert answers(read(folder / "b.tar", None, text="cls")) == ["cat"]


# --- folders and patterns ------------------------------------------------------------------


def test_what_systems_leave_in_folders_and_archives_is_passed_over_and_counted(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log.configure("text")
    for name in ("._1.png", "._1.txt", "__MACOSX/2.png", ".DS_Store", "Thumbs.db"):
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        (folder / "images" / name).write_bytes(b"junk")
    for n in range(13):
        (folder / "images" / f"{n}.txt").write_text(f"x_{n}")
    (folder / "images" / "README.txt").write_text("x")
    spec = replace(data_spec(folder / "images"), eval_fraction=0.3)
    run(spec, tmp_path)
    stats = json.loads((tmp_path / "prepared" / "stats.json").read_text())
    assert stats["passed_over"]["train"] == {
        "texts about the folder": 1,
        "left there by systems and tools": 5,
    }
    assert "first=README.txt" in capfd.readouterr().err
    path = archive(folder / "a.tar")
    add(path, ("._7.png", b"junk"), ("__MACOSX/._7.txt", b"junk"), (".DS_Store", b"junk"))
    for n in range(3, 13):
        add(path, (f"{n}.png", png(40 + n)), (f"{n}.txt", b"x%d" % n))
    data = run(replace(spec, train=data_spec(path).train), tmp_path / "b")
    assert data.rejected_rows == 0
    stats = json.loads((tmp_path / "b" / "prepared" / "stats.json").read_text())
    assert stats["passed_over"]["train"] == {
        "members of archives left there by systems and tools": 3
    }


def test_copies_that_notebooks_keep_of_a_list_are_no_rows(folder: Path) -> None:
    write_jsonl(folder, ROWS)
    (folder / ".ipynb_checkpoints").mkdir()
    write_jsonl(folder, ROWS, ".ipynb_checkpoints/rows-checkpoint.jsonl")
    source = find_source(data_spec(folder).train[0], "x")
    assert [file.name for file in source.files] == ["rows.jsonl"]
    assert source.skipped["left there by systems and tools"].files == 1
    assert source.skipped["images, which are read if a list names them"].files == 13


NAMES: dict[str, Callable[[str], str]] = {
    "a star": lambda name: f"{name}*.jsonl",
    "brackets": lambda name: f"{name}[1].jsonl",
    "braces": lambda name: f"{name}{{1,2}}.jsonl",
    "a question mark": lambda name: f"{name}?.jsonl",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_there_is_read_before_its_name_is_taken_for_a_pattern(
    name: str, folder: Path
) -> None:
    path = write_jsonl(folder, ROWS, NAMES[name]("rows"))
    write_jsonl(folder, [pair(9)], "rows1.jsonl")
    assert answers(read(path)) == TEXTS
    path.unlink()
    if name == "a star":
        assert answers(read(path)) == [pair(9)["text"]]


def test_a_folder_with_brackets_in_its_name_is_read(folder: Path) -> None:
    (folder / "v[1]").mkdir()
    write_jsonl(folder, [{"question": "?", "answer": "x"}], "v[1]/rows.jsonl")
    assert answers(read(folder / "v[1]")) == ["x"]


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.jsonl.zst", "rows.csv.xz"])
def test_workbooks_and_other_packings_are_refused_by_name(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"is a workbook|has a compression"):
        read(folder / name)
