"""The rows that a report shows: which ones, with their pictures, answers and differences."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from job.evaluation import render_match
from job.evaluation.report.text import Shown, difference, plain
from job.prep.images import ImageRefused, decode
from job.prep.records import Row
from job.redaction import redact

if TYPE_CHECKING:
    from PIL.Image import Image

DENSITY = 2  # pixels of a drawn answer per pixel of the page, for sharp screens
_WIDEST, _TALLEST = 760, 480  # pixels of a picture in the report
_WIDEST_DRAWN = 2_400  # an answer drawn wider would be a thread once it is scaled to the page
_BYTES_AN_IMAGE = 48_000

Prediction = Mapping[str, Any]
"""A line of `predictions.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    uri: str
    """`data:image/…;base64,…`"""
    width: int
    height: int
    """In pixels of the page."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row as the report shows it."""

    id: str
    label: Shown
    before: Shown | None
    """None where there is no baseline."""
    after: Shown
    cer: float
    cer_before: float | None
    exact: bool
    same_formula: bool
    render: str | None
    image: Picture | None
    drawn: Picture | None
    """The answer as a formula; None where mathtext cannot draw it."""


@dataclass
class Album:
    """Makes pictures for a page until `left` bytes are used up."""

    left: int
    refused: int = field(default=0, init=False)

    def add(self, image: "Image", density: int = 1) -> Picture | None:
        """The picture scaled down and encoded anew: nothing of the file it came from is kept."""
        image.thumbnail((_WIDEST * density, _TALLEST * density))
        grey = image.convert("L")
        # Most formulas are grey; a grey copy that differs nowhere is a third of the bytes.
        if image.mode != "L" and grey.convert(image.mode).tobytes() == image.tobytes():
            image = grey
        data, kind = _encoded(image, "PNG"), "png"
        if len(data) > _BYTES_AN_IMAGE:
            data, kind = _encoded(image, "JPEG"), "jpeg"
        if len(data) > self.left:
            self.refused += 1
            return None
        self.left -= len(data)
        uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        width, height = (max(1, round(side / density)) for side in image.size)
        return Picture(uri=uri, width=width, height=height)


def choose(found: Sequence[Prediction], samples: int, worst: int) -> tuple[list[int], list[int]]:
    """Which rows are samples, evenly spread, and which are the worst; no row is both.

    A row that is right is not among the worst, and at most a third of all rows are.
    """
    wrong = [i for i in range(len(found)) if cer(found[i]) > 0]
    last = sorted(wrong, key=lambda i: (-cer(found[i]), i))[: min(worst, len(found) // 3)]
    others = sorted(set(range(len(found))) - set(last))
    count = min(samples, len(others))
    return [others[i * len(others) // count] for i in range(count)], last


def samples(
    chosen: Sequence[int],
    after: Sequence[Prediction],
    before: Mapping[str, Prediction],
    rows: Sequence[Row] | None,
    album: Album,
) -> tuple[Sample, ...]:
    """The chosen rows of `after` with their pictures; `before` holds the baseline by row id.

    `rows` are the prepared rows that the predictions answer, in the same order.
    """
    return tuple(_sample(index, after[index], before, rows, album) for index in chosen)


def cer(found: Prediction) -> float:
    """Edits per character of the row's label; 0 where the answer is the label."""
    return float(found.get("score", {}).get("cer", 0.0))


def _sample(
    index: int,
    found: Prediction,
    before: Mapping[str, Prediction],
    rows: Sequence[Row] | None,
    album: Album,
) -> Sample:
    label, answer, score = str(found["label"]), str(found["prediction"]), found.get("score", {})
    first = before.get(found["id"])
    drawn = render_match.draw(answer, size=12, dpi=96 * DENSITY)
    if drawn is not None and drawn.width > _WIDEST_DRAWN:
        drawn = None
    image = _input(index, str(found["id"]), rows)
    return Sample(
        id=str(found["id"])[:120],
        label=plain(label),
        before=None if first is None else difference(str(first["prediction"]), label),
        after=difference(answer, label),
        cer=cer(found),
        cer_before=None if first is None else cer(first),
        exact=bool(score.get("exact_match")),
        same_formula=bool(score.get("exact_match_normalized")),
        render=found.get("render"),
        image=None if image is None else album.add(image),
        drawn=None if drawn is None else album.add(drawn, DENSITY),
    )


def _input(index: int, name: str, rows: Sequence[Row] | None) -> "Image | None":
    """The first picture of the row that was asked."""
    if rows is None or index >= len(rows):
        return None
    row = rows[index]
    if redact(row.id) != name or not row.images:
        return None
    try:
        return decode(row.images[0])
    except ImageRefused:
        return None


def _encoded(image: "Image", kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 80} if kind == "JPEG" else {"optimize": True}))
    return out.getvalue()
