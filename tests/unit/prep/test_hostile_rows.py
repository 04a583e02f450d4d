"""Hostile or broken rows and images: each is used, or is one reject line."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from job import families
from job.errors import DataError
from job.prep.images import ImageRefused, decode, inspect
from job.spec.load import load_spec
from tests.unit.prep.test_prep import data_spec, folder, pair, png, rejects, run, write_jsonl

__all__ = ["folder"]  # the fixture

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (40, 20), color) for color in ("red", "green", "blue")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


USED = {
    "CMYK": saved(Image.new("CMYK", (40, 20), (0, 255, 255, 0)), "JPEG"),
    "16 bits": saved(Image.new("I;16", (40, 20), 65_535), "PNG"),
    "floats": saved(Image.new("F", (40, 20), 0.5), "TIFF"),
    "a palette": saved(Image.new("P", (40, 20), 3), "GIF"),
    "one bit": saved(Image.new("1", (40, 20), 1), "BMP"),
    "animated GIF": animated("GIF"),
    "animated PNG": animated("PNG"),
    "animated WebP": animated("WEBP"),
    "many pages": animated("TIFF"),
    "EXIF that lies": saved(
        Image.new("RGB", (40, 20)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff"
    ),
}


@pytest.mark.parametrize("name", USED)
def test_an_odd_picture_becomes_its_first_frame_in_rgb(name: str) -> None:
    pixels = decode(inspect(USED[name]))
    assert (pixels.mode, pixels.size) == ("RGB", (40, 20))
    if name.startswith("animated"):
        red, green, blue = pixels.getpixel((5, 5))  # type: ignore[misc]
        assert red > 200
        assert max(green, blue) < 60


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
REFUSED = {
    "SVG": (SVG, "XML or SVG"),
    "SVG with its XML line": (b'<?xml version="1.0"?>' + SVG, "XML or SVG"),
    "30,000 pixels wide": (png(30_000, 300), "at most 16384 a side"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of"),
    "a PDF": (b"%PDF-1.7\n", "not one of"),
    "a pickle": (b"\x80\x04\x95cos\nsystem\n", "not one of"),
    "an archive": (b"PK\x03\x04" + bytes(60), "not one of"),
    "a line": (png(2, 1000), "the aspect ratio must not exceed 200"),
    "33 MiB": (png() + bytes(33 * 2**20), "more than"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_usable_picture_is_refused_with_its_reason(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ImageRefused, match=reason):
        inspect(data)


def messages(question: list[Any], images: list[str]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "x"},
        ],
        "images": images,
    }


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "?"}
ROWS = {
    "more images than places": messages([IMAGE, TEXT], ["images/1.png", "images/2.png"]),
    "more places than images": messages([IMAGE, IMAGE, TEXT], ["images/1.png"]),
    "a null label": {"image": "images/1.png", "text": None},
    "a label of lists": {"image": "images/1.png", "text": ["x"]},
    "a null byte in a path": {"image": "images/1\0.png", "text": "x"},
    "a path of 5,000 letters": {"image": "a" * 5000, "text": "x"},
    "a folder": {"image": "images", "text": "x"},
    "a device": {"image": "../../../../dev/zero", "text": "x"},
    "a path of Windows": {"image": "..\\..\\secret.png", "text": "x"},
    "what ends a line": {"image": "a\x85b\u2028c\nd.png", "text": "x"},
    "what steers a terminal": {"id": "\x1b[2J\u2029", "image": "\x9b31m.png", "text": "x"},
    "a URL": {"image": "http://169.254.169.254/latest/meta-data", "text": "x"},
    "half a surrogate": '{"image": "images/1.png", "text": "\\ud800"}',
    "NaN as a label": '{"image": "images/1.png", "text": NaN}',
    "nesting without end": "[" * 100_000,
    "nesting that ends": '{"image": "images/1.png", "text": ' + "[" * 900 + "]" * 900 + "}",
    "a link to itself": {"image": "images/itself.png", "text": "x"},
    "a pipe": {"image": "images/pipe.png", "text": "x"},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_row_is_one_reject_line(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "itself.png").symlink_to("itself.png")
    os.mkfifo(folder / "images" / "pipe.png")
    rows = [*[pair(n) for n in range(12)], ROWS[name]]
    spec = data_spec(write_jsonl(folder, rows), eval_fraction=0.3, max_bad_rows=1)
    data = run(spec, tmp_path)
    assert data.rejected_rows == 1
    [(row, reason)] = rejects(tmp_path).items()
    assert row.startswith("rows.jsonl:13")
    assert reason
    assert (row + reason).isprintable()


def test_bytes_that_are_no_utf8_are_one_reject_line(folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(folder, [pair(n) for n in range(12)])
    path.write_bytes(path.read_bytes() + b'{"image": "images/1.png", "text": "\xff\xfe"}\n')
    data = run(data_spec(path, eval_fraction=0.3, max_bad_rows=1), tmp_path)
    assert data.rejected_rows == 1
    assert list(rejects(tmp_path)) == ["rows.jsonl:13"]


def test_rows_that_repeat_keep_ids_of_their_own(folder: Path, tmp_path: Path) -> None:
    rows = [pair(n, id="the same") for n in range(12)] + [pair(1, id="the same")]
    data = run(data_spec(write_jsonl(folder, rows), eval_fraction=0.3), tmp_path)
    ids = [row.id for row in (*data.rows("train"), *data.rows("eval"))]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "typed", ["<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|end_of_sentence|>"]
)
def test_a_control_token_typed_in_a_text_is_a_clear_error(
    typed: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    rows = [{**pair(n), "text": f"x {typed} {n}"} for n in range(12)]
    data = run(data_spec(write_jsonl(folder, rows), eval_fraction=0.3), tmp_path)
    spec = load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec
    family = families.bind(families.read_checkpoint("tiny", TINY), spec.model, spec.data)
    with pytest.raises(DataError, match=r"rows\.jsonl:\d+"):
        family.encode(next(iter(data.rows("train"))))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: png()[:40] + tail))
def test_whatever_the_bytes_are_they_are_an_image_or_refused(data: bytes) -> None:
    try:
        found = inspect(data)
    except ImageRefused:
        return
    assert decode(found).size == (found.width, found.height)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
odd_rows = st.one_of(
    anything,
    st.fixed_dictionaries({"image": anything, "text": anything}),
    st.fixed_dictionaries({"messages": anything, "images": anything}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": anything, "content": anything}), max_size=3
            )
        }
    ),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(odd=st.lists(odd_rows, max_size=5))
def test_whatever_the_rows_are_each_is_used_or_rejected(
    odd: list[Any],
    folder: Path,
    tmp_path: Path,
) -> None:
    good = [pair(n) for n in range(12)]
    path = write_jsonl(folder, good + [json.dumps(row) for row in odd])
    data = run(data_spec(path, eval_fraction=0.3, max_bad_rows=len(odd)), tmp_path)
    rejected = len(rejects(tmp_path))
    assert data.rejected_rows == rejected
    assert data.train_rows + data.eval_rows + rejected + data.leaked_rows == 12 + len(odd)
