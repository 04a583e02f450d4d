r"""JSON answers: validity, and the fraction of correct fields.

| metric | unit | definition |
|---|---|---|
| `valid_json` | fraction of answers, 0 to 1 | the answer is JSON, and nothing else |
| `exact_object` | fraction of answers, 0 to 1 | it equals the label's value, up to key order and white space |
| `field_precision` | 0 to 1 | fraction of all answers' fields that are in their labels |
| `field_recall` | 0 to 1 | fraction of all labels' fields that are in their answers |
| `field_f1` | 0 to 1 | harmonic mean of the two |
| `exact_match`, `cer` | | as for text (`job.evaluation.metrics`) |

A field is a value at a path: `{"items": [{"price": 5}]}` has one, `items[].price = 5`. Items of a
list share a path, so an answer that misses the first item loses only that one. Duplicates count as
often as they occur. Text is compared in its normal form and numbers by value; an empty list or
object is a value. An answer that is not JSON has no fields.

Rows whose label is not JSON are excluded from these metrics and counted as `labels_not_json`.
"""  # noqa: E501  a table's row is one line

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

INVALID: Final = object()
"""The result of `parse` for invalid JSON."""
NAMES = ("valid_json", "exact_object", "field_precision", "field_recall", "field_f1")
MAX_DEPTH = 100
"""Deeper nesting counts as invalid JSON."""
MAX_PATHS = 50
"""Maximum number of paths in the table of fields: those that are most frequent in the labels."""

Field = tuple[str, str]
"""A path, and the value at it as JSON."""


@dataclass(frozen=True, kw_only=True)
class FieldScore:
    """The score of one answer."""

    valid_json: bool
    exact_object: bool
    fields_right: int
    fields_answered: int
    fields_expected: int
    field_f1: float
    label_is_json: bool


@dataclass(frozen=True, kw_only=True)
class PathScore:
    """Counts of the values at one path, over all rows."""

    path: str
    right: int
    answered: int
    expected: int

    @property
    def f1(self) -> float:
        return f1(self.right, self.answered, self.expected)


def parse(text: str) -> object:
    """The text's JSON value, or INVALID."""
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        return INVALID
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (
            e.values() if isinstance(e, dict) else e for e in level if isinstance(e, dict | list)
        )
        level = [each for values in inner for each in values]
    return INVALID if level else value


def canonical(value: object) -> str:
    """A value's normal form: sorted keys, numbers by value, normalized text."""
    match value:
        case dict():
            inner = sorted((_text(key), canonical(each)) for key, each in value.items())
            return "{" + ",".join(f"{json.dumps(key)}:{each}" for key, each in inner) + "}"
        case list():
            return "[" + ",".join(map(canonical, value)) + "]"
        case str():
            return json.dumps(_text(value), ensure_ascii=False)
        case float() if value.is_integer():
            return str(int(value))
    return json.dumps(value)


def fields_of(value: object, path: str = "") -> Iterator[Field]:
    """Every leaf value, with its path."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from fields_of(inner, f"{path}.{_text(key)}" if path else _text(key))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from fields_of(inner, f"{path}[]")
    else:
        yield path, canonical(value)


def score(prediction: str, label: str) -> tuple[FieldScore, Counter[Field], Counter[Field]]:
    """The score of one answer, and the fields of answer and label."""
    answer, truth = parse(prediction), parse(label)
    valid, known = answer is not INVALID, truth is not INVALID
    answered = Counter(fields_of(answer) if valid else ())
    expected = Counter(fields_of(truth) if known else ())
    right = (answered & expected).total()
    return (
        FieldScore(
            valid_json=valid,
            exact_object=valid and known and canonical(answer) == canonical(truth),
            fields_right=right,
            fields_answered=answered.total(),
            fields_expected=expected.total(),
            field_f1=f1(right, answered.total(), expected.total()),
            label_is_json=known,
        ),
        answered,
        expected,
    )


@dataclass(frozen=True, kw_only=True)
class FieldScores:
    """The scores of all answers."""

    scores: tuple[FieldScore, ...]
    metrics: dict[str, float]
    """All field metrics; empty if no label is JSON."""
    paths: tuple[PathScore, ...]
    """In order of first occurrence in the labels; at most `MAX_PATHS`."""


def score_all(predictions: Sequence[str], labels: Sequence[str]) -> FieldScores:
    """Scores every answer, and every path over all answers."""
    scores: list[FieldScore] = []
    totals: dict[str, Counter[str]] = {
        name: Counter() for name in ("right", "answered", "expected")
    }
    for prediction, label in zip(predictions, labels, strict=True):
        row_score, answered, expected = score(prediction, label)
        scores.append(row_score)
        if not row_score.label_is_json:
            continue
        for name, counted in (
            ("expected", expected), ("answered", answered), ("right", answered & expected),
        ):  # fmt: skip
            for (path, _), count in counted.items():
                totals[name][path] += count
    frequent = dict(totals["expected"].most_common(MAX_PATHS))
    paths = tuple(
        PathScore(path=path, **{name: counted[path] for name, counted in totals.items()})
        for path in totals["expected"]
        if path in frequent
    )
    return FieldScores(scores=tuple(scores), metrics=_summary(scores), paths=paths)


def _summary(scores: Sequence[FieldScore]) -> dict[str, float]:
    known = [each for each in scores if each.label_is_json]
    if not known:
        return {}
    right = sum(each.fields_right for each in known)
    answered = sum(each.fields_answered for each in known)
    expected = sum(each.fields_expected for each in known)
    return {
        "valid_json": sum(each.valid_json for each in known) / len(known),
        "exact_object": sum(each.exact_object for each in known) / len(known),
        "field_precision": right / max(1, answered),
        "field_recall": right / max(1, expected),
        "field_f1": f1(right, answered, expected),
    }


def f1(right: int, answered: int, expected: int) -> float:
    """The harmonic mean of precision and recall; 0 if nothing is right."""
    return 2 * right / max(1, answered + expected)


def _text(value: str) -> str:
    return " ".join(unicodedata.normalize("NFC", value).split())


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
