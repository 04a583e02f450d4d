"""The sample rows in a report, with their images, answers and differences."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from job.evaluation import render_match
from job.evaluation.report.embedded_images import DENSITY, EmbeddedImage, ImageEmbedder
from job.evaluation.report.formatting import amount
from job.evaluation.report.generated_text import MAX_CHARACTERS, Excerpt, difference, plain
from job.prep.images import ImageRefused, decode
from job.prep.rows import Row
from job.redaction import redact
from job.spec.answer_kinds import Answer

_MAX_RENDERED_WIDTH = 2_400  # wider images would be illegible once scaled to the page
_MAX_IMAGES, _MAX_TURNS = 6, 12  # shown per row
MAX_JSON_CHARACTERS = 1_200
"""Maximum number of characters that are shown of a JSON text."""

PredictionRecord = Mapping[str, Any]
"""A line of `predictions.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class PromptTurn:
    """A turn of the conversation before the answer."""

    role: str
    text: Excerpt


@dataclass(frozen=True, kw_only=True)
class Tag:
    text: str
    tone: Literal["good", "bad", ""] = ""


_RENDER_TAGS = {
    "match": Tag(text="same image", tone="good"),
    "differs": Tag(text="different image"),
    "failed": Tag(text="does not render", tone="bad"),
    "skipped": Tag(text="label does not render"),
}


@dataclass(frozen=True, kw_only=True)
class SampleScore:
    """An answer's error rate or F1, as text."""

    name: str
    before: str | None
    after: str


@dataclass(frozen=True, kw_only=True)
class AnswerCard:
    """One answer on the page."""

    id: str
    turn: int | None
    """Number of the answer in its conversation; None if it is the only one."""
    turns: tuple[PromptTurn, ...]
    """The conversation before the answer; empty if all rows share one question, shown once."""
    earlier: int
    """Number of earlier turns, which are not shown."""
    label: Excerpt
    before: Excerpt | None
    """None without a baseline."""
    after: Excerpt
    tags: tuple[Tag, ...]
    score: SampleScore | None
    images: tuple[EmbeddedImage, ...]
    more_images: int
    """Number of the row's images that are not shown."""
    rendered: EmbeddedImage | None
    """The rendered formula; None if the answer is not a formula, or cannot be rendered."""


def choose(
    predictions: Sequence[PredictionRecord], samples: int, worst: int, kind: Answer = "latex"
) -> tuple[list[int], list[int]]:
    """The indices of evenly spaced samples, and of the worst answers; the two do not overlap.

    The worst answers include no right ones, and are at most a third of all.
    """
    errors = [error(each, kind) for each in predictions]
    wrong = [i for i in range(len(predictions)) if errors[i] > 0]
    chosen = sorted(wrong, key=lambda i: (-errors[i], i))[: min(worst, len(predictions) // 3)]
    others = sorted(set(range(len(predictions))) - set(chosen))
    count = min(samples, len(others))
    return [others[i * len(others) // count] for i in range(count)], chosen


@dataclass(frozen=True, kw_only=True)
class SampleBuilder:
    """Builds samples from the predictions and their rows."""

    kind: Answer
    after: Sequence[PredictionRecord]
    before: Mapping[tuple[str, int], PredictionRecord]
    """The baseline, by row id and number of the answer."""
    rows: Sequence[Row] | None
    """The evaluated rows; predictions refer to them by number."""
    shared_question: str | None
    """The question, if all answers have the same one."""

    @classmethod
    def of(
        cls,
        kind: Answer,
        before: Sequence[PredictionRecord],
        after: Sequence[PredictionRecord],
        rows: Sequence[Row] | None,
    ) -> "SampleBuilder":
        return cls(
            kind=kind,
            after=after,
            before={key_of(row): row for row in before},
            rows=rows,
            shared_question=_shared_question(after),
        )

    def samples(self, chosen: Sequence[int], embedder: ImageEmbedder) -> tuple[AnswerCard, ...]:
        """Builds the cards of the chosen answers."""
        return tuple(self._sample(index, embedder) for index in chosen)

    def _sample(self, index: int, embedder: ImageEmbedder) -> AnswerCard:
        prediction = self.after[index]
        label, answer = str(prediction["label"]), str(prediction["prediction"])
        limit = MAX_JSON_CHARACTERS if self.kind == "json" else MAX_CHARACTERS
        baseline = self.before.get(key_of(prediction))
        images, more = self._images(index, prediction, embedder)
        asked = prediction.get("asked", ())
        turns = [
            PromptTurn(role=str(turn["role"]), text=plain(_as_text(turn), limit)) for turn in asked
        ]
        number = int(prediction.get("turn", 1))
        return AnswerCard(
            id=str(prediction["id"])[:120],
            turn=number if number > 1 or _has_answer(asked) else None,
            turns=() if self.shared_question is not None else tuple(turns[-_MAX_TURNS:]),
            earlier=max(0, len(turns) - _MAX_TURNS),
            label=plain(label, limit),
            before=None if baseline is None
            else difference(str(baseline["prediction"]), label, limit),
            after=difference(answer, label, limit),
            tags=tuple(tags(prediction, self.kind)),
            score=_score(prediction, baseline, self.kind),
            images=images,
            more_images=more,
            rendered=self._rendered(answer, embedder) if self.kind == "latex" else None,
        )  # fmt: skip

    def _rendered(self, answer: str, embedder: ImageEmbedder) -> EmbeddedImage | None:
        image = render_match.render(answer, size=12, dpi=96 * DENSITY)
        if image is None or image.width > _MAX_RENDERED_WIDTH:
            return None
        return embedder.embed(image, DENSITY)

    def _images(
        self, index: int, prediction: PredictionRecord, embedder: ImageEmbedder
    ) -> tuple[tuple[EmbeddedImage, ...], int]:
        number = int(prediction.get("row", index))
        if self.rows is None or number >= len(self.rows):
            return (), 0
        row = self.rows[number]
        return (
            ((), 0)
            if redact(row.id) != str(prediction["id"])
            else images(row, prediction, embedder)
        )


def images(
    row: Row, prediction: PredictionRecord, embedder: ImageEmbedder
) -> tuple[tuple[EmbeddedImage, ...], int]:
    """The row's images in the conversation before the answer, and the number of those not shown."""
    mentioned = [
        part["image"]
        for turn in prediction.get("asked", ())
        for part in turn["content"]
        if part["type"] == "image"
    ]
    indices = mentioned if "asked" in prediction else range(len(row.images))
    shown = []
    for i in [i for i in indices if i < len(row.images)][:_MAX_IMAGES]:
        with suppress(ImageRefused):
            image = embedder.embed(decode(row.images[i]))
            shown += [image] if image is not None else []
    return tuple(shown), max(0, len(indices) - _MAX_IMAGES)


def tags(prediction: PredictionRecord, kind: Answer) -> Iterator[Tag]:
    """An answer's tags, depending on the kind of answer."""
    score = prediction.get("score", {})
    if kind == "label":
        yield (
            Tag(text="correct", tone="good")
            if score.get("correct")
            else Tag(text="wrong", tone="bad")
        )
    elif kind == "json":
        if score.get("exact_object"):
            yield Tag(text="exact object", tone="good")
        elif not score.get("label_is_json", True):
            yield Tag(text="label is not JSON")
        elif score.get("valid_json"):
            yield Tag(text=f"{score['fields_right']} of {score['fields_expected']} fields correct")
        else:
            yield Tag(text="not JSON", tone="bad")
    elif score.get("exact_match"):
        yield Tag(text="exact", tone="good")
    elif score.get("exact_match_normalized"):
        yield Tag(text="same formula" if kind == "latex" else "same text", tone="good")
    if prediction.get("render") in _RENDER_TAGS:
        yield _RENDER_TAGS[prediction["render"]]
    if prediction.get("cut_short"):
        yield Tag(text="cut short", tone="bad")


def error(prediction: PredictionRecord, kind: Answer = "latex") -> float:
    """How wrong an answer is; 0 if it is right."""
    score = prediction.get("score", {})
    if kind == "label":
        return float(not score.get("correct", True))
    if kind == "json" and score.get("label_is_json"):
        return 0.0 if score.get("exact_object") else 2.0 - float(score.get("field_f1", 0.0))
    return cer(prediction)


def is_right(prediction: PredictionRecord, kind: Answer) -> bool:
    """Whether an answer counts as right.

    Text and formulas by the normal form, JSON by the object, labels by the class.
    """
    score = prediction.get("score", {})
    if kind == "label":
        return bool(score.get("correct"))
    if kind == "json":
        return bool(score.get("exact_object" if score.get("label_is_json") else "exact_match"))
    return bool(score.get("exact_match_normalized", score.get("exact_match")))


def cer(prediction: PredictionRecord) -> float:
    """Edits per character of the label."""
    return float(prediction.get("score", {}).get("cer", 0.0))


def _score(
    prediction: PredictionRecord, baseline: PredictionRecord | None, kind: Answer
) -> SampleScore | None:
    if kind == "label":
        return None
    if kind == "json":
        if not prediction.get("score", {}).get("label_is_json"):
            return None
        value = prediction["score"]["field_f1"]
        before = None if baseline is None else baseline["score"]["field_f1"]
        name = "field F1"
    else:
        value, before, name = cer(prediction), None if baseline is None else cer(baseline), "CER"
    return SampleScore(
        name=name, before=None if before is None else amount(before), after=amount(value)
    )


def key_of(prediction: PredictionRecord) -> tuple[str, int]:
    """The row's id, and the number of the answer in it."""
    return str(prediction["id"]), int(prediction.get("turn", 1))


def _has_answer(turns: Sequence[Mapping[str, Any]]) -> bool:
    return any(turn["role"] == "assistant" for turn in turns)


def _shared_question(predictions: Sequence[PredictionRecord]) -> str | None:
    """The text of every row's question, if all are a single user turn with the same text."""
    texts = {
        "".join(part.get("text") or "" for part in row["asked"][0]["content"])
        if len(row["asked"]) == 1
        else None
        for row in predictions
        if "asked" in row
    }
    return texts.pop() if len(texts) == 1 else None


def _as_text(turn: Mapping[str, Any]) -> str:
    """A turn's text, with numbered placeholders for images."""
    return "".join(
        f"[image {part['image'] + 1}] " if part["type"] == "image" else str(part["text"])
        for part in turn["content"]
    )
