"""The rows that a report shows: which ones, with their pictures, answers and differences."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.evaluation import render_match
from job.evaluation.report_text import Piece, Shown, difference, show
from job.prep.images import ImageRefused, decode
from job.prep.records import Row
from job.prep.shards import Rows

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES, WORST = 24, 12
_WIDEST, _TALLEST = 560, 360  # pixels of a picture in the report
_WIDEST_ANSWER = 1_600  # a drawn answer beyond this would be a thread once it is scaled down
_BYTES_AN_IMAGE = 48_000
_BYTES_OF_IMAGES = 1_900_000  # of all together; base64 adds a third


@dataclass(frozen=True, kw_only=True)
class Picture:
    uri: str
    """`data:image/…;base64,…`"""
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row as the report shows it."""

    id: str
    label: Shown
    before: Shown | None
    after: Shown
    difference: tuple[Piece, ...]
    cer: float
    exact: bool
    same_formula: bool
    render: str | None
    image: Picture | None
    drawn: Picture | None


@dataclass
class Album:
    """Makes pictures for a page until their bytes are used up."""

    left: int = _BYTES_OF_IMAGES
    refused: int = field(default=0, init=False)

    def add(self, image: "Image") -> Picture | None:
        """The picture scaled down and encoded anew: nothing of the file it came from is kept."""
        image = image.convert("RGB")
        image.thumbnail((_WIDEST, _TALLEST))
        data, kind = _encoded(image, "PNG"), "png"
        if len(data) > _BYTES_AN_IMAGE:
            data, kind = _encoded(image, "JPEG"), "jpeg"
        if len(data) > min(self.left, 2 * _BYTES_AN_IMAGE):
            self.refused += 1
            return None
        self.left -= len(data)
        uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return Picture(uri=uri, width=image.width, height=image.height)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def choose(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Which rows are samples, evenly spread, and which are the worst; no row is both.

    A row that is right is not among the worst, however few rows there are.
    """
    wrong = [i for i in range(len(rows)) if _cer(rows[i]) > 0]
    worst = sorted(wrong, key=lambda i: (-_cer(rows[i]), i))[: min(WORST, len(rows) // 3)]
    others = [i for i in range(len(rows)) if i not in set(worst)]
    count = min(SAMPLES, len(others))
    return [others[i * len(others) // count] for i in range(count)], worst


def samples(
    chosen: Sequence[int],
    after: Sequence[Mapping[str, Any]],
    before: Mapping[str, str],
    rows: Rows | None,
    album: Album,
) -> list[Sample]:
    """The chosen rows with their pictures; `before` holds the first answers by row id."""
    return [_sample(index, after[index], before, rows, album) for index in chosen]


def _sample(
    index: int,
    found: Mapping[str, Any],
    before: Mapping[str, str],
    rows: Rows | None,
    album: Album,
) -> Sample:
    label, answer, score = str(found["label"]), str(found["prediction"]), found.get("score", {})
    first = before.get(found["id"])
    drawn = render_match.draw(answer, size=14, dpi=110)
    if drawn is not None and drawn.width > _WIDEST_ANSWER:
        drawn = None
    image = _input(index, str(found["id"]), rows)
    return Sample(
        id=show(str(found["id"]), 120).text,
        label=show(label),
        before=None if first is None else show(first),
        after=show(answer),
        difference=difference(answer, label),
        cer=_cer(found),
        exact=bool(score.get("exact_match")),
        same_formula=bool(score.get("exact_match_normalized")),
        render=found.get("render"),
        image=None if image is None else album.add(image),
        drawn=None if drawn is None else album.add(drawn),
    )


def _input(index: int, name: str, rows: Rows | None) -> "Image | None":
    """The first picture of the row that was asked; predictions are in the rows' order."""
    if rows is None or index >= len(rows):
        return None
    row: Row = rows[index]
    if row.id != name or not row.images:
        return None
    try:
        return decode(row.images[0])
    except ImageRefused:
        return None


def _cer(found: Mapping[str, Any]) -> float:
    return float(found.get("score", {}).get("cer", 0.0))


def _encoded(image: "Image", kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 80} if kind == "JPEG" else {"optimize": True}))
    return out.getvalue()
