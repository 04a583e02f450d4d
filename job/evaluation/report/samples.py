"""The rows that a report shows: which ones, with their pictures, answers and differences."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from job.evaluation import render_match
from job.evaluation.report.generated_text import LONGEST, Shown, difference, plain
from job.prep.images import ImageRefused, decode
from job.prep.rows import Row
from job.redaction import redact
from job.spec.answer_kinds import Answer

if TYPE_CHECKING:
    from PIL.Image import Image

DENSITY = 2  # pixels of a drawn answer per pixel of the page, for sharp screens
_WIDEST, _TALLEST = 760, 480  # pixels of a picture in the report
_WIDEST_DRAWN = 2_400  # an answer drawn wider would be a thread once it is scaled to the page
_BYTES_AN_IMAGE = 48_000

_IMAGES, _TURNS = 6, 12  # of a row that are shown
LONGEST_JSON = 1_200
"""Characters of a JSON text that are shown."""

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
class Said:
    """A turn of the conversation before an answer."""

    role: str
    text: Shown


@dataclass(frozen=True, kw_only=True)
class Tag:
    text: str
    tone: Literal["good", "bad", ""] = ""


_RENDERED = {
    "match": Tag(text="same picture", tone="good"),
    "differs": Tag(text="another picture"),
    "failed": Tag(text="draws no picture", tone="bad"),
    "skipped": Tag(text="label cannot be drawn"),
}


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How far an answer is off, as text."""

    name: str
    before: str | None
    after: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer as the report shows it."""

    id: str
    turn: int | None
    """Which answer of its conversation; None where the row has one."""
    asked: tuple[Said, ...]
    """Empty where every row is asked the same, which is said once."""
    earlier: int
    """Turns before those of `asked`."""
    label: Shown
    before: Shown | None
    """None where there is no baseline."""
    after: Shown
    tags: tuple[Tag, ...]
    rate: Rate | None
    images: tuple[Picture, ...]
    more_images: int
    """Images of the row that are not shown."""
    drawn: Picture | None
    """The answer as a formula; None where mathtext cannot draw it, or it is none."""


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


def choose(
    found: Sequence[Prediction], samples: int, worst: int, kind: Answer = "latex"
) -> tuple[list[int], list[int]]:
    """Which answers are samples, evenly spread, and which are the worst; no answer is both.

    One that is right is not among the worst, and at most a third of all are.
    """
    far = [distance(row, kind) for row in found]
    wrong = [i for i in range(len(found)) if far[i] > 0]
    last = sorted(wrong, key=lambda i: (-far[i], i))[: min(worst, len(found) // 3)]
    others = sorted(set(range(len(found))) - set(last))
    count = min(samples, len(others))
    return [others[i * len(others) // count] for i in range(count)], last


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What samples are taken from."""

    kind: Answer
    after: Sequence[Prediction]
    before: Mapping[tuple[str, int], Prediction]
    """The baseline by the row's id and the number of the answer."""
    rows: Sequence[Row] | None
    """The prepared rows that were asked about, by their number."""
    alike: str | None
    """The one question of all answers, if there is no other."""

    @classmethod
    def of(
        cls,
        kind: Answer,
        before: Sequence[Prediction],
        after: Sequence[Prediction],
        rows: Sequence[Row] | None,
    ) -> "Subject":
        return cls(
            kind=kind,
            after=after,
            before={_key(row): row for row in before},
            rows=rows,
            alike=_one_question(after),
        )

    def samples(self, chosen: Sequence[int], album: "Album") -> tuple[Sample, ...]:
        """The chosen answers with all that belongs to them."""
        return tuple(self._sample(index, album) for index in chosen)

    def _sample(self, index: int, album: "Album") -> Sample:
        found = self.after[index]
        label, answer = str(found["label"]), str(found["prediction"])
        limit = LONGEST_JSON if self.kind == "json" else LONGEST
        first = self.before.get(_key(found))
        shown, more = self._images(index, found, album)
        asked = found.get("asked", ())
        said = [Said(role=str(turn["role"]), text=plain(_spelled(turn), limit)) for turn in asked]
        return Sample(
            id=str(found["id"])[:120],
            turn=int(found.get("turn", 1)) if len(_answers(asked)) or found.get("turn", 1) > 1
            else None,
            asked=() if self.alike is not None else tuple(said[-_TURNS:]),
            earlier=max(0, len(said) - _TURNS),
            label=plain(label, limit),
            before=None if first is None else difference(str(first["prediction"]), label, limit),
            after=difference(answer, label, limit),
            tags=tuple(tags(found, self.kind)),
            rate=_rate(found, first, self.kind),
            images=shown,
            more_images=more,
            drawn=self._drawn(answer, album) if self.kind == "latex" else None,
        )  # fmt: skip

    def _drawn(self, answer: str, album: "Album") -> Picture | None:
        drawn = render_match.draw(answer, size=12, dpi=96 * DENSITY)
        if drawn is None or drawn.width > _WIDEST_DRAWN:
            return None
        return album.add(drawn, DENSITY)

    def _images(
        self, index: int, found: Prediction, album: "Album"
    ) -> tuple[tuple[Picture, ...], int]:
        """The images that were shown before the answer, and how many are left out."""
        place = int(found.get("row", index))
        if self.rows is None or place >= len(self.rows):
            return (), 0
        row = self.rows[place]
        if redact(row.id) != str(found["id"]):
            return (), 0
        named = [
            part["image"]
            for turn in found.get("asked", ())
            for part in turn["content"]
            if part["type"] == "image"
        ]
        numbers = named if "asked" in found else range(len(row.images))
        pictures = []
        for number in [n for n in numbers if n < len(row.images)][:_IMAGES]:
            with suppress(ImageRefused):
                picture = album.add(decode(row.images[number]))
                pictures += [picture] if picture is not None else []
        return tuple(pictures), max(0, len(numbers) - _IMAGES)


def tags(found: Prediction, kind: Answer) -> Iterator[Tag]:
    """What an answer is called, in the words of its task."""
    score = found.get("score", {})
    if kind == "label":
        yield (
            Tag(text="right", tone="good")
            if score.get("correct")
            else Tag(text="wrong", tone="bad")
        )
    elif kind == "json":
        if score.get("exact_object"):
            yield Tag(text="exact object", tone="good")
        elif not score.get("label_is_json", True):
            yield Tag(text="label is no JSON")
        elif score.get("valid_json"):
            yield Tag(text=f"{score['fields_right']} of {score['fields_expected']} fields right")
        else:
            yield Tag(text="no JSON", tone="bad")
    elif score.get("exact_match"):
        yield Tag(text="exact", tone="good")
    elif score.get("exact_match_normalized"):
        yield Tag(text="same formula" if kind == "latex" else "same text", tone="good")
    if found.get("render") in _RENDERED:
        yield _RENDERED[found["render"]]
    if found.get("cut_short"):
        yield Tag(text="cut short", tone="bad")


def distance(found: Prediction, kind: Answer = "latex") -> float:
    """How far an answer is off: 0 where it is right."""
    score = found.get("score", {})
    if kind == "label":
        return float(not score.get("correct", True))
    if kind == "json" and score.get("label_is_json"):
        return 0.0 if score.get("exact_object") else 2.0 - float(score.get("field_f1", 0.0))
    return cer(found)


def cer(found: Prediction) -> float:
    """Edits per character of the row's label; 0 where the answer is the label."""
    return float(found.get("score", {}).get("cer", 0.0))


def _rate(found: Prediction, first: Prediction | None, kind: Answer) -> Rate | None:
    if kind == "label":
        return None
    if kind == "json":
        if not found.get("score", {}).get("label_is_json"):
            return None
        f1 = [None if row is None else row["score"]["field_f1"] for row in (first, found)]
        return Rate(name="field F1", before=_amount(f1[0]), after=str(_amount(f1[1])))
    return Rate(
        name="CER", before=_amount(None if first is None else cer(first)),
        after=str(_amount(cer(found))),
    )  # fmt: skip


def _amount(value: float | None) -> str | None:
    from job.evaluation.report.facts import amount

    return None if value is None else amount(value)


def _key(found: Prediction) -> tuple[str, int]:
    return str(found["id"]), int(found.get("turn", 1))


def _answers(asked: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Earlier answers of the conversation."""
    return [turn for turn in asked if turn["role"] == "assistant"]


def _one_question(found: Sequence[Prediction]) -> str | None:
    """What every row is asked, if it is one text from the user alone, images aside."""
    asked = {
        "".join(part.get("text") or "" for part in row["asked"][0]["content"])
        if len(row["asked"]) == 1
        else None
        for row in found
        if "asked" in row
    }
    return asked.pop() if len(asked) == 1 else None


def _spelled(turn: Mapping[str, Any]) -> str:
    """A turn's text, with the images by their number."""
    return "".join(
        f"[image {part['image'] + 1}] " if part["type"] == "image" else str(part["text"])
        for part in turn["content"]
    )


def _encoded(image: "Image", kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 80} if kind == "JPEG" else {"optimize": True}))
    return out.getvalue()
