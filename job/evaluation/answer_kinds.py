"""The normal form of each kind of answer: answers match if their normal forms are equal.

| kind | normal form |
|---|---|
| `text` | Unicode NFC, white space collapsed and stripped |
| `label` | the same; case-sensitive |
| `latex` | one spelling for all formulas that render the same (`job.evaluation.latex`) |
| `json` | the value with sorted keys (`job.evaluation.fields`); invalid JSON as `text` |
"""

import unicodedata
from collections.abc import Callable, Mapping

from job.evaluation import fields, latex
from job.spec.answer_kinds import Answer


def text(answer: str) -> str:
    """The normal form of plain text."""
    return " ".join(unicodedata.normalize("NFC", answer).split())


def as_json(answer: str) -> str:
    """The normal form of a JSON value; invalid JSON is normalized as text."""
    value = fields.parse(answer)
    return text(answer) if value is fields.INVALID else fields.canonical(value)


# Module-level functions, because they are pickled for the processes that prepare rows.
NORMALIZERS: Mapping[Answer, Callable[[str], str]] = {
    "text": text,
    "latex": latex.normalize,
    "json": as_json,
    "label": text,
}
