r"""Answers that are JSON: how many are valid, and how many of their fields are right.

| metric | unit | definition |
|---|---|---|
| `valid_json` | share of answers, 0 to 1 | the answer is JSON, and nothing else |
| `exact_object` | share of answers, 0 to 1 | it is the label's value; order of keys and white space aside |
| `field_precision` | share, 0 to 1 | of the fields of all answers, those that their labels have |
| `field_recall` | share, 0 to 1 | of the fields of all labels, those that their answers have |
| `field_f1` | share, 0 to 1 | the harmonic mean of the two |
| `exact_match`, `cer` | | as for text (`job.evaluation.metrics`) |

A field is a value at a path: `{"items": [{"price": 5}]}` has one, `items[].price = 5`. The items of
a list share their path, so a list that lacks its first item loses that one and no more; a value that
stands there twice counts twice. Text is compared in its normal form, numbers by their value, an empty
list or object is a value of its own. An answer that is no JSON has no fields.

A label that is no JSON says nothing about fields: its row is left out of these metrics and counted as
`labels_not_json`.
"""  # noqa: E501  a table's row is one line

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

INVALID: Final = object()
"""What `parse` makes of a text that is no JSON."""
NAMES = ("valid_json", "exact_object", "field_precision", "field_recall", "field_f1")
DEEPEST = 100
"""Levels of a value; a text that nests deeper is taken for no JSON."""
MOST_PATHS = 50
"""Paths that are told apart in the table of fields, those of the labels with the most values."""

Field = tuple[str, str]
"""A path, and the value at it as JSON."""


@dataclass(frozen=True, kw_only=True)
class FieldScore:
    """One answer against its label."""

    valid_json: bool
    exact_object: bool
    fields_right: int
    fields_answered: int
    fields_expected: int
    field_f1: float
    label_is_json: bool


@dataclass(frozen=True, kw_only=True)
class PathScore:
    """The values at one path, of all rows."""

    path: str
    right: int
    answered: int
    expected: int

    @property
    def f1(self) -> float:
        return f1(self.right, self.answered, self.expected)


def parse(text: str) -> Any:
    """The JSON value that a text is, or INVALID."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return INVALID
    level = [value]
    for _ in range(DEEPEST):
        inner = (
            e.values() if isinstance(e, dict) else e for e in level if isinstance(e, dict | list)
        )
        level = [each for values in inner for each in values]
    return INVALID if level else value


def canonical(value: Any) -> str:
    """One spelling of a value: keys sorted, numbers by value, text in its normal form."""
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


def fields_of(value: Any, path: str = "") -> Iterator[Field]:
    """Every value that holds no other, with its path."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from fields_of(inner, f"{path}.{_text(key)}" if path else _text(key))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from fields_of(inner, f"{path}[]")
    else:
        yield path, canonical(value)


def score(prediction: str, label: str) -> tuple[FieldScore, Counter[Field], Counter[Field]]:
    """One answer against its label, and the fields of both."""
    found, wanted = parse(prediction), parse(label)
    valid, known = found is not INVALID, wanted is not INVALID
    answered = Counter(fields_of(found) if valid else ())
    expected = Counter(fields_of(wanted) if known else ())
    right = (answered & expected).total()
    return (
        FieldScore(
            valid_json=valid,
            exact_object=valid and known and canonical(found) == canonical(wanted),
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
class FieldsJudged:
    """All answers together."""

    scores: tuple[FieldScore, ...]
    metrics: dict[str, float]
    """Every metric of fields; none where no label is JSON."""
    paths: tuple[PathScore, ...]
    """In the order of the labels' first rows; at most `MOST_PATHS`."""


def judge(predictions: Sequence[str], labels: Sequence[str]) -> FieldsJudged:
    """Scores every answer, and all of them by path."""
    scores: list[FieldScore] = []
    totals: dict[str, Counter[str]] = {
        name: Counter() for name in ("right", "answered", "expected")
    }
    for prediction, label in zip(predictions, labels, strict=True):
        found, answered, expected = score(prediction, label)
        scores.append(found)
        if not found.label_is_json:
            continue
        for name, counted in (
            ("expected", expected), ("answered", answered), ("right", answered & expected),
        ):  # fmt: skip
            for (path, _), count in counted.items():
                totals[name][path] += count
    kept = dict(totals["expected"].most_common(MOST_PATHS))
    paths = tuple(
        PathScore(path=path, **{name: counted[path] for name, counted in totals.items()})
        for path in totals["expected"]
        if path in kept
    )
    return FieldsJudged(scores=tuple(scores), metrics=_summary(scores), paths=paths)


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
    """The harmonic mean of precision and recall; 0 where nothing is right."""
    return 2 * right / max(1, answered + expected)


def _text(value: str) -> str:
    return " ".join(unicodedata.normalize("NFC", value).split())


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
