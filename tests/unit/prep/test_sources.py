"""Every way in which people keep rows is read, as a stream, from anywhere."""

import base64
import csv
import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job import storage
from job.errors import DataError, InputError
from job.prep import image_identity, readers, sources
from job.prep.discovery import find_source
from job.prep.readers import tars
from job.prep.result_checks import TooManyBadRows
from job.prep.rows import Row
from job.spec.types import DataSpec
from tests.unit.prep.test_prep import data_spec, png, rejects, run, with_source, write_jsonl

COUNT = 12


def rows_of(spec: DataSpec, tmp_path: Path) -> dict[str, Row]:
    """The rows by what they say."""
    data = run(replace(spec, eval_fraction=0.3), tmp_path)
    return {row.answer: row for row in (*data.rows("train"), *data.rows("eval"))}


def image_bytes(number: int) -> bytes:
    return png(40 + number)


def text_of(number: int) -> str:
    return f"x_{{{number}}}, y"


def plain() -> list[dict[str, Any]]:
    return [{"image": f"images/{n}.png", "text": text_of(n)} for n in range(COUNT)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for n in range(COUNT):
        (images / f"{n}.png").write_bytes(image_bytes(n))
    return images.parent


def delimited(path: Path, delimiter: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(plain())
    return path


def as_jsonl_gz(folder: Path) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in plain())))
    return path


def as_json(folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(plain(), indent=1))
    return folder / "rows.json"


def as_parquet_of_structs(folder: Path) -> Path:
    images = [{"bytes": image_bytes(n), "path": None} for n in range(COUNT)]
    table = pa.table({"image": images, "text": [text_of(n) for n in range(COUNT)]})
    pq.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def as_parquet_of_bytes(folder: Path) -> Path:
    images, texts = [image_bytes(n) for n in range(COUNT)], [text_of(n) for n in range(COUNT)]
    pq.write_table(pa.table({"image": images, "text": texts}), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_arrow_file(folder: Path) -> Path:
    table = pa.Table.from_pylist(plain())
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as w,
    ):
        w.write_table(table, max_chunksize=5)
    return folder / "rows.arrow"


def as_base64(folder: Path) -> Path:
    rows = [
        {"image": base64.b64encode(image_bytes(n)).decode(), "text": text_of(n)}
        for n in range(COUNT)
    ]
    return write_jsonl(folder, rows)


def as_pairs(folder: Path) -> Path:
    for n in range(COUNT):
        (folder / "images" / f"{n}.txt").write_text(text_of(n) + "\n")
    return folder / "images"


def as_metadata(folder: Path) -> Path:
    rows = [{"file_name": f"{n}.png", "text": text_of(n)} for n in range(COUNT)]
    write_jsonl(folder / "images", rows, "metadata.jsonl")
    return folder / "images"


def as_tar(folder: Path, mode: str = "w", name: str = "rows.tar") -> Path:
    with tarfile.open(folder / name, mode) as archive:  # type: ignore[call-overload]
        for n in range(COUNT):
            add(archive, f"a/{n:03}.png", image_bytes(n))
            add(archive, f"a/{n:03}.txt", text_of(n).encode())
    return folder / name


def as_tar_gz(folder: Path) -> Path:
    return as_tar(folder, "w:gz", "rows.tar.gz")


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **header: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def as_saved_dataset(folder: Path) -> Path:
    images = [{"bytes": image_bytes(n), "path": None} for n in range(COUNT)]
    columns = {"image": images, "text": [text_of(n) for n in range(COUNT)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_shards(folder: Path) -> Path:
    for shard in range(3):
        write_jsonl(folder, plain()[shard::3], f"train-{shard:05}-of-00003.jsonl")
    write_jsonl(folder, plain(), "test-00000-of-00001.jsonl")
    return folder


KINDS: dict[str, Any] = {
    "jsonl": lambda f: write_jsonl(f, plain()),
    "jsonl.gz": as_jsonl_gz,
    "json": as_json,
    "csv": lambda f: delimited(f / "rows.csv", ","),
    "tsv": lambda f: delimited(f / "rows.tsv", "\t"),
    "parquet of structs": as_parquet_of_structs,
    "parquet of bytes": as_parquet_of_bytes,
    "arrow file": as_arrow_file,
    "base64": as_base64,
    "pairs of files": as_pairs,
    "metadata beside images": as_metadata,
    "webdataset": as_tar,
    "webdataset, packed": as_tar_gz,
    "save_to_disk": as_saved_dataset,
    "shards of a split": as_shards,
}


def kept_as(kind: str, where: str, folder: Path, tmp_path: Path, **settings: Any) -> DataSpec:
    """The spec of rows that are kept so, in a folder or in a store."""
    path = KINDS[kind](folder)
    uri = str(path)
    if where == "memory":
        storage.copy_tree(str(folder), f"memory://{tmp_path}")
        uri = f"memory://{tmp_path}/{path.relative_to(folder)}".removesuffix("/.")
    split = "train" if kind in ("save_to_disk", "shards of a split") else None
    return with_source(data_spec(Path("x"), **settings), uri=uri, split=split)


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_however_and_wherever_they_are_kept(
    kind: str, where: str, folder: Path, tmp_path: Path
) -> None:
    rows = rows_of(kept_as(kind, where, folder, tmp_path), tmp_path)
    assert rows.keys() == {text_of(n) for n in range(COUNT)}
    for n in range(COUNT):
        assert rows[text_of(n)].images[0].data == image_bytes(n)


def test_a_glob_reads_every_file_that_it_matches(folder: Path, tmp_path: Path) -> None:
    as_shards(folder)
    assert len(rows_of(data_spec(folder / "train-*.jsonl"), tmp_path)) == COUNT


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("train-{00000..00002}-of-00003.jsonl", [0, 1, 2]),
        ("train-0000{0,2}-of-{00003,00003}.jsonl", [0, 0, 2, 2]),
        ("train-0000{1..2}-*.jsonl", [1, 2]),
    ],
)
def test_braces_stand_for_what_they_do_in_a_shell(
    pattern: str, files: list[int], folder: Path
) -> None:
    as_shards(folder)
    found = find_source(data_spec(folder / pattern).train[0], "x").files
    assert [int(file.uri.rpartition("train-")[2][:5]) for file in found] == files


def test_braces_that_stand_for_too_much_or_for_nothing_are_refused(folder: Path) -> None:
    as_shards(folder)
    for pattern, reason in (
        ("{000..999}-{000..999}.jsonl", "more than 100,000 files"),
        ("train-{00000..00009}-of-00003.jsonl", "no such file"),
        ("train-{3..1}.jsonl", "no files there can be read"),
    ):
        with pytest.raises(InputError, match=reason):
            find_source(data_spec(folder / pattern).train[0], "$.data.train")


@pytest.mark.parametrize("where", ["file", "memory"])
def test_images_can_lie_in_another_folder_than_their_list(
    where: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "lists").mkdir()
    images = str(folder / "images")
    if where == "memory":
        images = f"memory://{tmp_path}/images"
        storage.copy_tree(str(folder / "images"), images)
    rows = [{"image": f"{n}.png", "text": text_of(n)} for n in range(COUNT - 1)]
    rows.append({"image": f"{images}/{COUNT - 1}.png", "text": text_of(COUNT - 1)})
    spec = data_spec(write_jsonl(tmp_path / "lists", rows))
    with pytest.raises(DataError, match=r"No such file|must be relative"):
        run(spec, tmp_path)
    spec = with_source(spec, image_folder=f"{images}/")
    assert rows_of(spec, tmp_path)[text_of(3)].images[0].data == image_bytes(3)
    assert len(rows_of(spec, tmp_path)) == COUNT, "one of them is named in full"
    source = find_source(spec.train[0], "x")
    before = image_identity.digest(source, spec.train[0])
    storage.write_bytes(f"{images}/{COUNT - 1}.png", png(99))
    assert image_identity.digest(source, spec.train[0]) != before


def test_images_named_in_full_are_read_in_the_folder_of_their_list_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside.png").write_bytes(png(90))
    rows = [{"image": str(folder / row["image"]), "text": row["text"]} for row in plain()]
    rows.append({"image": str(tmp_path / "outside.png"), "text": "x"})
    rows.append({"image": f"{folder}/../outside.png", "text": "y"})
    write_jsonl(folder, rows)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    rows[0]["image"] = f"{tmp_path}/link/images/0.png"
    write_jsonl(folder, rows)
    assert len(rows_of(data_spec(Path("link/rows.jsonl"), max_bad_rows=2), tmp_path)) == COUNT
    outside, upward = rejects(tmp_path).values()
    assert "must be relative to the folder of its list" in outside
    assert "leaves the folder" in upward
    (folder / "data").mkdir()
    (folder / "data" / "a.png").write_bytes(image_bytes(3))
    assert sources.fetch("data", "data/a.png") == image_bytes(3), (
        "no part of a relative path is cut"
    )


def test_files_of_one_name_in_two_folders_give_rows_of_different_ids(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / "d" / part).mkdir(parents=True)
        (tmp_path / "d" / part / "p.png").write_bytes(png(60 if part == "a" else 61))
        row = [{"image": "p.png", "text": f"{part}{n}"} for n in range(6)]
        write_jsonl(tmp_path / "d" / part, row)
    rows = rows_of(data_spec(tmp_path / "d"), tmp_path)
    assert {row.id.partition(":")[0] for row in rows.values()} == {"a/rows.jsonl", "b/rows.jsonl"}
    assert rows["b0"].images[0].width == 61, "a path starts from the folder of its own list"


def test_sharegpt_rows_are_conversations_with_images_at_their_marks(
    folder: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Look:\n<image>\nWhat is it?"},
                {"from": "gpt", "value": text_of(n)},
            ],
            "images": [f"images/{n}.png"],
        }
        for n in range(COUNT)
    ]
    row = rows_of(data_spec(write_jsonl(folder, rows)), tmp_path)[text_of(3)]
    assert [message.role for message in row.messages] == ["system", "user", "assistant"]
    assert [part.image for part in row.messages[1].parts] == [None, 0, None]
    assert row.messages[1].text == "Look:\nWhat is it?"


def test_sharegpt_without_marks_has_its_images_first(folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": ""}]
    rows = [
        {"conversations": [turns[0], {**turns[1], "value": text_of(n)}], "image": f"images/{n}.png"}
        for n in range(COUNT)
    ]
    row = rows_of(data_spec(write_jsonl(folder, rows)), tmp_path)[text_of(3)]
    assert [part.image for part in row.messages[0].parts] == [0, None]


def test_questions_with_answers_ask_what_their_rows_say(folder: Path, tmp_path: Path) -> None:
    for question, answer in (("question", "answer"), ("query", "response")):
        rows: list[dict[str, Any]] = [
            {question: f"What is {n}?", answer: text_of(n), "image": f"images/{n}.png"}
            for n in range(COUNT)
        ]
        rows[2][question] = "Before\n<image>\nafter"
        rows[3] = {question: "No image?", answer: text_of(3)}
        rows[4][question] = None
        found = rows_of(data_spec(write_jsonl(folder, rows)), tmp_path)
        asked = [found[text_of(n)].messages[0] for n in range(5)]
        assert [part.image for part in asked[0].parts] == [0, None]
        assert asked[0].text == "What is 0?"
        assert [part.image for part in asked[2].parts] == [None, 0, None]
        assert (asked[3].text, found[text_of(3)].images) == ("No image?", ())
        assert asked[4].text == "Write the LaTeX representation for this image."


def test_alpaca_rows_are_questions_with_and_without_input_history_and_image(
    folder: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Read it.", "input": "As LaTeX.", "output": text_of(n)}
        for n in range(COUNT)
    ]
    rows[3] |= {"images": ["images/3.png"], "history": [["a", "b"]], "system": "S"}
    found = rows_of(data_spec(write_jsonl(folder, rows)), tmp_path)
    assert found[text_of(0)].messages[0].text == "Read it.\nAs LaTeX."
    assert found[text_of(0)].images == ()
    third = found[text_of(3)]
    assert [m.role for m in third.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert third.messages[1].parts[0].image == 0


def test_a_wrong_mapping_shows_a_sample_row(folder: Path, tmp_path: Path) -> None:
    spec = data_spec(write_jsonl(folder, [{"picture": "images/1.png", "latex": "x" * 90}]))
    with pytest.raises(DataError, match=r"picture, latex; rows\.jsonl:1 is \{picture: images/1"):
        run(spec, tmp_path)


def test_an_image_without_text_is_one_reject(folder: Path, tmp_path: Path) -> None:
    as_pairs(folder)
    (folder / "images" / "alone.png").write_bytes(png(90))
    spec = data_spec(folder / "images", max_bad_rows=1)
    assert len(rows_of(spec, tmp_path)) == COUNT
    assert rejects(tmp_path) == {"alone.png": "has no text file of the same name"}


def test_a_pair_whose_name_is_not_utf8_is_a_row(folder: Path, tmp_path: Path) -> None:
    as_pairs(folder)
    for name, content in ((b"\xff.png", png(90)), (b"\xff.txt", b"another")):
        Path(os.fsdecode(os.fsencode(folder / "images") + b"/" + name)).write_bytes(content)
    spec = data_spec(folder / "images")
    assert find_source(spec.train[0], "x").digest
    rows = rows_of(spec, tmp_path)
    assert len(rows) == COUNT + 1
    assert rows["another"].id.isprintable()


def test_a_text_without_image_is_one_reject_too_unless_it_is_about_the_folder(
    folder: Path, tmp_path: Path
) -> None:
    as_pairs(folder)
    for name in ("alone.txt", "README.txt", "classes.txt", "3.tex"):
        (folder / "images" / name).write_text("x")
    with pytest.raises(TooManyBadRows, match=r"alone\.txt: has no image of the same name; add it"):
        run(data_spec(folder / "images", max_bad_rows=1), tmp_path)
    assert len(rows_of(data_spec(folder / "images", max_bad_rows=2), tmp_path)) == COUNT
    assert list(rejects(tmp_path)) == ["3.txt", "alone.txt"]
    assert rejects(tmp_path)["3.txt"].startswith("is a second text of its image")


def test_a_relative_path_that_is_missing_is_told_with_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        run(data_spec(Path("rows")), tmp_path)
    fix = f"check the path, which starts at {tmp_path}, `split` and `format`"
    assert caught.value.problems[0].fix == fix


@pytest.mark.parametrize("name", ["", "alone.png"])
def test_an_image_that_is_the_whole_source_is_not_read_as_a_list(tmp_path: Path, name: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "alone.png").write_bytes(png(90))
    with pytest.raises(DataError, match=r"alone\.png: has no text file of the same name"):
        run(data_spec(tmp_path / "one" / name), tmp_path)


def test_a_damaged_json_array_is_told_with_the_item_before_it(folder: Path, tmp_path: Path) -> None:
    path = as_json(folder)
    path.write_text(path.read_text()[:-60])
    with pytest.raises(DataError, match=r"rows\.json: is not JSON after item 10"):
        run(data_spec(path), tmp_path)


@pytest.mark.parametrize(
    ("name", "delimiter"),
    [("rows.csv", ";"), ("rows.csv", "\t"), ("rows.tsv", ","), ("rows.csv", "|")],
)
def test_a_list_is_read_by_the_delimiter_of_its_first_line(
    name: str, delimiter: str, folder: Path, tmp_path: Path
) -> None:
    assert len(rows_of(data_spec(delimited(folder / name, delimiter)), tmp_path)) == COUNT


@pytest.mark.parametrize(
    ("row", "reason"),
    [(b"a,b,c\n", "more values than"), (b"a,\xff\xfe\n", "not UTF-8"), (b"a\n", "must be text")],
)
def test_a_bad_csv_row_is_one_reject(row: bytes, reason: str, folder: Path, tmp_path: Path) -> None:
    path = delimited(folder / "rows.csv", ",")
    path.write_bytes(path.read_bytes() + row.replace(b"a", b"images/0.png"))
    assert len(rows_of(data_spec(path, max_bad_rows=1), tmp_path)) == COUNT
    [found] = rejects(tmp_path).values()
    assert reason in found


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_quote_that_is_never_closed_swallows_no_row(
    delimiter: str, folder: Path, tmp_path: Path
) -> None:
    path = delimited(folder / ("rows.csv" if delimiter == "," else "rows.tsv"), delimiter)
    lines = path.read_text().replace('"', "").splitlines()  # which would close it
    lines[4] = f'images/3.png{delimiter}"x'
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"rows\..sv:4: a quote in line 5 is never closed"):
        run(data_spec(path, max_bad_rows=9), tmp_path)


@pytest.mark.parametrize(
    ("delimiter", "reason"), [(",", "expected after '\"'"), ("\t", "a value has several lines")]
)
def test_a_quote_that_another_row_closes_is_a_reject(
    delimiter: str, reason: str, folder: Path, tmp_path: Path
) -> None:
    path = delimited(folder / ("rows.csv" if delimiter == "," else "rows.tsv"), delimiter)
    lines = path.read_text().splitlines()
    lines[4], lines[6] = f'images/3.png{delimiter}"x', f'images/5.png{delimiter}"y"'
    if delimiter == "\t":
        lines[6] = f'images/5.png{delimiter}y"'
    path.write_text("\n".join(lines) + "\n")
    run(data_spec(path, max_bad_rows=9), tmp_path)
    assert any(reason in found for found in rejects(tmp_path).values())


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a symbolic link": ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link"),
    "a hard link": ({"type": tarfile.LNKTYPE, "linkname": "a/000.png"}, "is a link"),
    "a device": ({"type": tarfile.CHRTYPE}, "is not a regular file"),
    "a path upward": ({"name": "../../b.png"}, "leaves the archive"),
    "an absolute path": ({"name": "/tmp/b.png"}, "leaves the archive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_member_of_an_archive_is_one_reject(
    name: str, folder: Path, tmp_path: Path
) -> None:
    header, reason = HOSTILE[name]
    with tarfile.open(as_tar(folder), "a") as archive:
        add(archive, **{"name": "b.png", **header})
    assert len(rows_of(data_spec(folder / "rows.tar", max_bad_rows=1), tmp_path)) == COUNT
    [found] = rejects(tmp_path).values()
    assert reason in found


def test_a_member_that_is_too_large_is_refused_by_its_header(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "MAX_LINE", 5000)
    with tarfile.open(as_tar(folder), "a") as archive:
        add(archive, "b.png", bytes(5001))
    assert len(rows_of(data_spec(folder / "rows.tar", max_bad_rows=1), tmp_path)) == COUNT
    assert "5001 bytes, more than 5000" in rejects(tmp_path)["rows.tar:b"]


def test_an_archive_with_endless_headers_or_cut_short_is_an_error(
    folder: Path, tmp_path: Path
) -> None:
    path = folder / "rows.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"x": "y" * 2**21}) as a:
        add(a, "b.png", image_bytes(1))
    with pytest.raises(DataError, match="not a readable tar"):
        list(readers.read(find_source(data_spec(path).train[0], "x").files[0]))
    as_tar(folder)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="not a readable tar"):
        list(readers.read(find_source(data_spec(path).train[0], "x").files[0]))


def test_a_packed_file_that_is_cut_is_an_error(folder: Path, tmp_path: Path) -> None:
    path = as_jsonl_gz(folder)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: cannot be read"):
        run(data_spec(path), tmp_path)


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_images_by_url_are_fetched_only_where_the_spec_allows_it(
    web: str, folder: Path, tmp_path: Path
) -> None:
    rows = [{"image": f"{web}/images/{n}.png", "text": text_of(n)} for n in range(COUNT)]
    spec = data_spec(write_jsonl(folder, rows), max_bad_rows=COUNT)
    with pytest.raises(DataError, match="has no usable row") as caught:
        run(spec, tmp_path)
    rows_named = [problem.field for problem in caught.value.problems[1:]]
    assert rows_named[0].endswith(":1"), "why none of them can be used"
    allowed = rows_of(replace(spec, allow_image_urls=True, max_bad_rows=0), tmp_path / "b")
    assert allowed[text_of(3)].images[0].data == image_bytes(3)


def test_a_list_can_lie_on_a_web_server(web: str, folder: Path, tmp_path: Path) -> None:
    as_json(folder)
    spec = data_spec(Path("x"))
    rows = rows_of(with_source(spec, uri=f"{web}/rows.json"), tmp_path)
    assert len(rows) == COUNT


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(("rows.pkl", "is a pickle"), ("rows.pt", "is a pickle"), ("rows.pkl.gz", "is a pickle")),
        *(("rows.npz", "may contain pickles"), ("rows.zip", "is an archive")),
    ],
)
def test_pickles_and_archives_are_refused_by_name(name: str, reason: str, folder: Path) -> None:
    (folder / name).write_bytes(b"\x80\x04\x95cos\nsystem\n")
    with pytest.raises(InputError, match=reason):
        find_source(data_spec(folder / name).train[0], "$.data.train")


def test_a_split_that_is_not_there_is_an_input_error(folder: Path) -> None:
    spec = data_spec(as_shards(folder)).train[0]
    with pytest.raises(InputError, match=r"split: does not exist; the folder has test, train"):
        find_source(replace(spec, split="validation"), "$.data.train")


def test_a_folder_of_several_splits_asks_which_one(folder: Path) -> None:
    spec = data_spec(as_shards(folder)).train[0]
    with pytest.raises(InputError, match=r"split: must name one of test, train"):
        find_source(spec, "$.data.train")
    assert len(find_source(replace(spec, split="train"), "x").files) == 3
    assert len(find_source(replace(spec, uri=f"{folder}/*.jsonl"), "x").files) == 4


def test_a_split_is_a_word_of_the_name_and_not_its_beginning(folder: Path) -> None:
    for name in ("train-0.jsonl", "pairs_train.jsonl", "trainer.jsonl", "test/train2.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_jsonl(folder, plain(), name)
    spec = replace(data_spec(folder).train[0], split="train")
    names = {file.name for file in find_source(spec, "x").files}
    assert names == {"train-0.jsonl", "pairs_train.jsonl"}


def test_a_changed_image_of_a_folder_changes_the_digest(folder: Path) -> None:
    spec = data_spec(as_pairs(folder)).train[0]
    before = find_source(spec, "x").digest
    (folder / "images" / "3.png").touch()
    assert find_source(spec, "x").digest == before, "dates do not count"
    (folder / "images" / "3.png").write_bytes(png(43, color="black"))
    assert find_source(spec, "x").digest != before


def test_a_table_with_embedded_images_is_not_read_for_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [{"bytes": image_bytes(n), "path": f"{n}.png"} for n in range(400)]
    pq.write_table(
        pa.table({"image": images, "text": ["x"] * 400}), tmp_path / "a.parquet", row_group_size=50
    )
    pq.write_table(
        pa.table({"image": [f"{n}.png" for n in range(400)], "text": ["x"] * 400}),
        tmp_path / "b.parquet",
    )
    given: list[str] = []
    read = readers.read

    def counted(file: Any, *start: Any) -> Iterator[readers.Record]:
        for record in read(file, *start):
            given.append(record.id)
            yield record

    monkeypatch.setattr(readers, "read", counted)
    for name, expected in (("a", range(1, 65)), ("b", range(400, 500))):
        spec = data_spec(tmp_path / f"{name}.parquet").train[0]
        given.clear()
        image_identity.digest(find_source(spec, "x"), spec)
        assert len(given) in expected


def turns(image: dict[str, object], answer: str, role: str, said: str) -> list[object]:
    asked = [image, {"type": "text", "text": "Read it."}]
    return [
        {role: "user" if role == "role" else "human", said: asked},
        {role: "assistant" if role == "role" else "gpt", said: answer},
    ]


NAMING: dict[str, Callable[[str], dict[str, object]]] = {
    "a pair": lambda path: {"image": path, "text": path},
    "a list": lambda path: {"images": [path], "text": path},
    "a part of a message": lambda path: {
        "messages": turns({"type": "image", "image": path}, path, "role", "content")
    },
    "a URL of a message": lambda path: {
        "messages": turns(
            {"type": "image_url", "image_url": {"url": path}}, path, "role", "content"
        )
    },
    "a part of a turn": lambda path: {
        "conversations": turns({"type": "image", "image": path}, path, "from", "value")
    },
}


@pytest.mark.parametrize("naming", NAMING)
def test_a_changed_image_under_an_unchanged_list_changes_the_digest_of_the_images(
    naming: str, folder: Path, tmp_path: Path
) -> None:
    write_jsonl(folder, [NAMING[naming](str(row["image"])) for row in plain()])
    assert len(rows_of(data_spec(folder / "rows.jsonl"), tmp_path / "read")) == COUNT
    storage.copy_tree(str(folder), f"memory://{tmp_path}")
    for root in (str(folder), f"memory://{tmp_path}"):
        spec = replace(data_spec(Path("x")).train[0], uri=f"{root}/rows.jsonl")
        source = find_source(spec, "x")
        lists, before = source.digest, image_identity.digest(source, spec)
        assert image_identity.digest(source, spec) == before
        storage.write_bytes(f"{root}/images/5.png", png(99))
        assert find_source(spec, "x").digest == lists
        assert image_identity.digest(source, spec) != before


def test_an_image_that_is_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "images" / "5.png").unlink()
    os.mkfifo(folder / "images" / "5.png")
    write_jsonl(folder, plain())
    spec = replace(data_spec(Path("x")).train[0], uri=f"{folder}/rows.jsonl")
    assert image_identity.digest(find_source(spec, "x"), spec)


def test_an_item_that_is_nested_deeply_is_one_reject(folder: Path, tmp_path: Path) -> None:
    deep = '{"image": "images/1.png", "text": ' + "[" * 900 + "]" * 900 + "}"
    rows = ", ".join([*map(json.dumps, plain()), deep])
    (folder / "rows.json").write_text(f"[{rows}]")
    run(data_spec(folder / "rows.json", max_bad_rows=1, eval_fraction=0.2), tmp_path)
    [reason] = rejects(tmp_path).values()
    assert "nested more than 100 deep" in reason
