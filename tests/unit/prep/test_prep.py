"""Prep: records to rows, bad ones to the rejects, splits that stay put."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from job.errors import DataError, SpecError
from job.evaluation.latex import normalize
from job.prep.discovery import find_source
from job.prep.images import ImageRefused, decode, inspect
from job.prep.prepare import PrepInputs, prepare
from job.prep.prepared_data import PreparedData
from job.prep.result_checks import TooManyBadRows
from job.prep.shards import Split
from job.prep.source_files import DataSource
from job.spec.load import load_spec
from job.spec.types import DataSpec


def png(width: int = 40, height: int = 20, color: str = "white", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images").mkdir(parents=True)
    for number in range(200):
        (tmp_path / "data" / "images" / f"{number}.png").write_bytes(png(40 + number))
    return tmp_path / "data"


def data_spec(uri: Path, **settings: Any) -> DataSpec:
    spec = f"""
version: 1
name: test
model: {{model_name_or_path: "builtin://ernie-vl-tiny", init: random}}
data:
  train: {{uri: "{uri}"}}
  instruction: "Write the LaTeX representation for this image."
output: {{uri: out}}
"""
    return replace(load_spec(spec, "spec", environ={}).spec.data, **settings)


def with_source(spec: DataSpec, **settings: Any) -> DataSpec:
    """The spec with other settings of its one source to train on."""
    return replace(spec, train=(replace(spec.train[0], **settings),))


def write_jsonl(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def run(spec: DataSpec, tmp_path: Path) -> PreparedData:
    sources = [find_source(source, "$.data.train") for source in spec.train]
    return prepare(inputs(spec, sources), tmp_path / "prepared")


def inputs(
    spec: DataSpec, train: list[DataSource], evaluation: DataSource | None = None, **more: Any
) -> PrepInputs:
    settings = {"seed": 1, "normalize_label": normalize, **more}
    return PrepInputs(spec=spec, train=tuple(train), evaluation=evaluation, **settings)


def test_a_check_that_raises_ends_prep(tmp_path: Path) -> None:
    spec = data_spec(write_jsonl(tmp_path, [{"messages": [], "images": []}] * 10))
    source = find_source(spec.train[0], "$.data.train")

    def check() -> None:
        raise SpecError("$.lora", "does not fit the model")

    with pytest.raises(SpecError, match="does not fit the model"):
        prepare(inputs(spec, [source]), tmp_path / "prepared", check)
    assert not (tmp_path / "prepared" / "stats.json").exists()


def rejects(tmp_path: Path) -> dict[str, str]:
    lines = (tmp_path / "prepared" / "rejects.jsonl").read_text().splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def pair(number: int, **extra: Any) -> dict[str, Any]:
    return {"image": f"images/{number}.png", "text": f"x_{{{number}}}", **extra}


def test_pairs_become_a_question_with_the_image_and_an_answer(folder: Path, tmp_path: Path) -> None:
    spec = data_spec(write_jsonl(folder, [pair(n) for n in range(12)]), eval_fraction=0.3)
    data = run(spec, tmp_path)
    assert data.train_rows + data.eval_rows == 12
    assert data.eval_rows > 0
    row = next(iter(data.rows("train")))
    assert [message.role for message in row.messages] == ["user", "assistant"]
    assert [part.image for part in row.messages[0].parts] == [0, None]
    assert row.messages[0].text == "Write the LaTeX representation for this image."
    number = int(row.answer.removeprefix("x_{").removesuffix("}"))
    assert row.id == f"rows.jsonl:{number + 1}"
    assert (row.images[0].width, row.images[0].height) == (40 + number, 20)
    assert row.images[0].data == (folder / "images" / f"{number}.png").read_bytes()


def test_parquet_with_bytes_gives_the_same_rows_as_jsonl_with_paths(
    folder: Path, tmp_path: Path
) -> None:
    numbers = range(12)
    lists = data_spec(write_jsonl(folder, [pair(n) for n in numbers]), eval_fraction=0.3)
    images = [
        {"bytes": (folder / "images" / f"{n}.png").read_bytes(), "path": None} for n in numbers
    ]
    table = pa.table({"image": images, "text": [f"x_{{{n}}}" for n in numbers]})
    pq.write_table(table, folder / "rows.parquet")
    tables = data_spec(folder / "rows.parquet", eval_fraction=0.3)
    a, b = run(lists, tmp_path / "a"), run(tables, tmp_path / "b")
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        left, right = list(a.rows(split)), list(b.rows(split))
        assert [r.images for r in left] == [r.images for r in right]
        assert [r.messages for r in left] == [r.messages for r in right]


def test_conversations_take_images_inline_and_from_the_column_in_order(
    folder: Path, tmp_path: Path
) -> None:
    url = "data:image/png;base64," + base64.b64encode(png(99)).decode()
    conversation = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "and"},
                    {"type": "image_url", "image_url": {"url": url}},
                ],
            },
            {"role": "assistant", "content": "different"},
        ],
        "images": ["images/3.png"],
    }
    data = run(
        data_spec(
            write_jsonl(folder, [conversation, *[pair_as_messages(n) for n in range(10, 30)]]),
            eval_fraction=0.2,
        ),
        tmp_path,
    )
    rows = [*data.rows("train"), *data.rows("eval")]
    row = next(row for row in rows if len(row.images) == 2)
    assert [image.width for image in row.images] == [43, 99]
    assert [part.image for part in row.messages[1].parts] == [0, None, 1]


def pair_as_messages(number: int) -> dict[str, Any]:
    question = [{"type": "image", "image": f"images/{number}.png"}, {"type": "text", "text": "?"}]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": f"a_{number}"}]},
        ]
    }


BAD = {
    "text of another type": ({"image": "images/1.png", "text": 5}, "must be text, found int"),
    "no text": ({"image": "images/1.png", "text": None}, "must be text, found NoneType"),
    "an empty answer": ({"image": "images/1.png", "text": " "}, "the answer is empty"),
    "a missing image": ({"image": "images/999.png", "text": "x"}, "No such file"),
    "no image": ({"image": None, "text": "x"}, "`image` is empty"),
    "a path out of the folder": ({"image": "../secret.png", "text": "x"}, "leaves the folder"),
    "an absolute path": ({"image": "/etc/passwd", "text": "x"}, "must be relative to the folder"),
    "a URI": ({"image": "file:///etc/passwd", "text": "x"}, "must be relative to the folder"),
    "a link out of the folder": ({"image": "images/link.png", "text": "x"}, "link that leaves"),
    "an empty file": ({"image": "images/empty.png", "text": "x"}, "empty (0 bytes)"),
    "a page called .png": ({"image": "images/page.png", "text": "x"}, "an HTML page"),
    "a truncated image": ({"image": "images/cut.png", "text": "x"}, "damaged"),
    "a decompression bomb": (
        {"image": "images/bomb.png", "text": "x"},
        "too large: Image size (900000000 pixels)",
    ),
    "one pixel": ({"image": "images/dot.png", "text": "x"}, "1×1"),
    "broken JSON": ('{"image": ', "unreadable line"),
    "a line that is no object": ("[1, 2]", "must be a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_rejected_with_its_reason(name: str, folder: Path, tmp_path: Path) -> None:
    images = folder / "images"
    (tmp_path / "outside.png").write_bytes(png())
    (images / "link.png").symlink_to(tmp_path / "outside.png")
    (images / "empty.png").touch()
    (images / "page.png").write_text("<!DOCTYPE html><html></html>")
    noise = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(noise, "PNG")
    (images / "cut.png").write_bytes(noise.getvalue()[:-900])
    header = png(1, 1)
    (images / "bomb.png").write_bytes(bomb(30_000))
    (images / "dot.png").write_bytes(header)
    row, reason = BAD[name]
    spec = data_spec(
        write_jsonl(folder, [*[pair(n) for n in range(12)], row]),
        eval_fraction=0.3,
        max_bad_rows=1,
    )
    data = run(spec, tmp_path)
    assert data.rejected_rows == 1
    assert list(rejects(tmp_path)) == ["rows.jsonl:13"]
    assert reason in rejects(tmp_path)["rows.jsonl:13"]


def bomb(side: int) -> bytes:
    """A PNG header that claims side × side pixels."""
    data = bytearray(png(1, 1))
    data[16:20] = data[20:24] = side.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def test_more_bad_rows_than_allowed_end_prep_and_are_all_listed(
    folder: Path, tmp_path: Path
) -> None:
    rows = [*[pair(n) for n in range(12)], pair(997), pair(998)]
    with pytest.raises(TooManyBadRows) as caught:
        run(data_spec(write_jsonl(folder, rows), max_bad_rows=1), tmp_path)
    assert caught.value.exit_code == 11
    assert "2 of 14 rows cannot be used, more than the 1 allowed" in str(caught.value)
    assert "rows.jsonl:13" in str(caught.value)
    assert list(rejects(tmp_path)) == ["rows.jsonl:13", "rows.jsonl:14"]
    allow = "or allow them: --set data.max_bad_rows=2"
    assert f"fix the rows listed in {tmp_path}/prepared/rejects.jsonl, {allow}" in str(caught.value)


@pytest.mark.parametrize("good", [[], [pair(0)]], ids=["no row at all", "no row to evaluate on"])
def test_bad_rows_are_not_to_be_allowed_if_the_others_do_not_suffice(
    folder: Path, tmp_path: Path, good: list[dict[str, str]]
) -> None:
    rows = [*good, pair(997), pair(998)]
    with pytest.raises(TooManyBadRows) as caught:
        run(data_spec(write_jsonl(folder, rows), eval_fraction=0.1), tmp_path)
    assert f"fix the rows listed in {tmp_path}/prepared/rejects.jsonl" in str(caught.value)
    assert "allow" not in str(caught.value).replace("the 0 allowed", "")


def test_the_held_out_rows_stay_the_same_when_rows_are_appended(
    folder: Path, tmp_path: Path
) -> None:
    rows = [{"image": f"images/{n}.png", "text": f"{n}"} for n in range(200)]
    spec = data_spec(write_jsonl(folder, rows[:100]), eval_fraction=0.2)
    before = {row.answer for row in run(spec, tmp_path / "a").rows("eval")}
    write_jsonl(folder, rows)
    after = {row.answer for row in run(spec, tmp_path / "b").rows("eval")}
    assert before == {answer for answer in after if int(answer) < 100}
    assert 20 <= len(after) <= 60


def test_duplicates_fall_on_one_side_of_the_split(folder: Path, tmp_path: Path) -> None:
    # The same label in two spellings and with two images.
    spellings = (r"x \le {}", r"x\leq{}")
    rows = [
        {"image": f"images/{n}.png", "text": spellings[n % 2].format(n // 2)} for n in range(120)
    ]
    data = run(data_spec(write_jsonl(folder, rows), eval_fraction=0.4), tmp_path)
    train = {normalize(row.answer) for row in data.rows("train")}
    held_out = {normalize(row.answer) for row in data.rows("eval")}
    assert len(train) + len(held_out) == 60
    assert not train & held_out
    assert data.leaked_rows == 0
    assert data.train_rows + data.eval_rows == 120


def test_what_is_held_out_by_name_is_removed_from_training(folder: Path, tmp_path: Path) -> None:
    train = [pair(n) for n in range(10)]
    held_out = [
        {"image": "images/3.png", "text": "the image of row 3"},
        {"image": "images/11.png", "text": r"x_{ 5 }\,"},
    ]
    spec = data_spec(write_jsonl(folder, train))
    spec = replace(
        spec, eval=replace(spec.train[0], uri=str(write_jsonl(folder, held_out, "e.jsonl")))
    )
    assert spec.eval is not None
    first = find_source(spec.train[0], "$.data.train")
    second = find_source(spec.eval, "$.data.eval")
    data = prepare(inputs(spec, [first], second), tmp_path / "prepared")
    assert data.leaked_rows == 2
    assert data.train_rows == len(data.rows("train")) == 8
    assert {row.answer for row in data.rows("train")} == {
        f"x_{{{n}}}" for n in range(10) if n not in (3, 5)
    }
    stats = json.loads((tmp_path / "prepared" / "stats.json").read_text())
    assert stats["leaked"] == {"rows": 2}


def test_a_limit_takes_the_first_rows_and_a_shuffle_seed_a_random_choice(
    folder: Path, tmp_path: Path
) -> None:
    rows = [{"image": f"images/{n}.png", "text": f"{n}"} for n in range(100)]
    spec = data_spec(write_jsonl(folder, rows), eval_fraction=0.2)

    def numbers(place: str, **settings: Any) -> list[int]:
        data = run(with_source(spec, **settings), tmp_path / place)
        rows = [*data.rows("train"), *data.rows("eval")]
        return sorted(int(row.answer) for row in rows)

    assert numbers("first", limit=30) == list(range(30))
    chosen = numbers("seed-5", limit=30, shuffle_seed=5)
    assert len(chosen) == 30
    assert chosen != list(range(30))
    assert chosen == numbers("seed-5-again", limit=30, shuffle_seed=5)
    assert chosen != numbers("seed-6", limit=30, shuffle_seed=6)


def test_a_wrong_column_mapping_shows_the_columns_that_exist(folder: Path, tmp_path: Path) -> None:
    spec = data_spec(write_jsonl(folder, [{"picture": "images/1.png", "latex": "x"}] * 3))
    with pytest.raises(DataError, match=r"no column `text`; the source has picture, latex"):
        run(spec, tmp_path)
    columns = replace(spec.train[0].columns, text="latex")
    with pytest.raises(DataError, match=r"(?s)columns\.image: there is no.*image: picture"):
        run(with_source(spec, columns=columns), tmp_path)
    columns = replace(spec.train[0].columns, image="picture", text="latexx")
    with pytest.raises(DataError, match="no column `latexx`"):
        run(with_source(spec, columns=columns), tmp_path)


@pytest.mark.parametrize(
    ("row", "named", "fix"),
    [
        ({"scan": "images/1.png", "latex": "x", "n": 1}, {}, "text: latex"),
        ({"scan": "images/1.png", "n": "1", "Formula": "x"}, {}, "text: Formula"),
        ({"scan": "data:image/png;base64,AAAA", "n": 1, "writing": "x"}, {}, "text: writing"),
        ({"n": 1, "scan": ["images/1.png"], "caption": "x"}, {"text": "caption"}, "image: scan"),
        ({"n": 1, "where": "1", "caption": "x"}, {"text": "caption"}, "image: n"),
        ({"scan": "images/1.png"}, {}, "check `uri` and `format`"),
    ],
)
def test_the_column_that_is_proposed_is_the_one_likely_meant(
    row: dict[str, Any], named: dict[str, str], fix: str, folder: Path, tmp_path: Path
) -> None:
    spec = data_spec(write_jsonl(folder, [row] * 3))
    columns = replace(spec.train[0].columns, **named)
    with pytest.raises(DataError) as caught:
        run(with_source(spec, columns=columns), tmp_path)
    proposed = caught.value.problems[0].fix
    assert proposed is not None
    assert proposed.endswith(fix)


def test_a_column_of_images_in_a_table_is_not_proposed_for_the_text(
    folder: Path, tmp_path: Path
) -> None:
    image = {"bytes": (folder / "images" / "1.png").read_bytes(), "path": None}
    pq.write_table(pa.table({"scan": [image], "tex_code": ["x"]}), folder / "rows.parquet")
    with pytest.raises(DataError, match="for example text: tex_code"):
        run(data_spec(folder / "rows.parquet"), tmp_path)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["{}"], "has no readable record"),
        ([""], "has no readable record"),
        (["not JSON"], r"rows\.jsonl:1: unreadable line: Expecting value"),
    ],
)
def test_a_list_without_any_column_is_an_error(lines: list[str], reason: str, folder: Path) -> None:
    with pytest.raises(DataError, match=reason):
        run(data_spec(write_jsonl(folder, lines)), folder)


def test_mapped_columns_are_read(folder: Path, tmp_path: Path) -> None:
    rows = [{"picture": f"images/{n}.png", "latex": f"{n}", "key": f"k{n}"} for n in range(12)]
    spec = data_spec(write_jsonl(folder, rows), eval_fraction=0.3)
    columns = replace(spec.train[0].columns, image="picture", text="latex", id="key")
    data = run(with_source(spec, columns=columns), tmp_path)
    row = data.rows("train")[0]
    assert row.id == f"rows.jsonl:{int(row.answer) + 1} (k{row.answer})"


def test_an_empty_split_is_an_error_that_names_its_key(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\$\.data\.eval_fraction"):
        run(data_spec(write_jsonl(folder, [pair(1)]), eval_fraction=1e-9), tmp_path)


def test_the_size_of_a_rotated_image_is_that_of_its_upright_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "JPEG", exif=exif)
    image = inspect(file.getvalue())
    assert (image.width, image.height) == (20, 40)
    assert decode(image).size == (20, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK", "YCbCr"])
def test_every_colour_mode_is_decoded_to_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (12, 9)).save(file, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    image = decode(inspect(file.getvalue()))
    assert (image.mode, image.size) == ("RGB", (12, 9))


def test_transparent_pixels_become_white() -> None:
    image = decode(inspect(png(6, 6, color="#00000000", mode="RGBA")))
    assert image.getpixel((3, 3)) == (255, 255, 255)


def test_text_chunks_that_unfold_are_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (70 * 2**20), zip=True)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG", pnginfo=info)
    with pytest.raises(ImageRefused, match="damaged"):
        inspect(file.getvalue())
