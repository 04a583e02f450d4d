"""The normal form of each kind of answer: two answers are the same where theirs are equal.

| kind | normal form |
|---|---|
| `text` | Unicode's NFC, white space as single spaces, none around |
| `label` | the same; upper and lower case differ |
| `latex` | one spelling of what draws the same (`job.evaluation.latex`) |
| `json` | the value with sorted keys (`job.evaluation.fields`); a text that is no JSON as `text` |
"""

import unicodedata
from collections.abc import Callable, Mapping

from job.evaluation import fields, latex
from job.spec.answer_kinds import Answer


def text(answer: str) -> str:
    """The normal form of plain text."""
    return " ".join(unicodedata.normalize("NFC", answer).split())


def as_json(answer: str) -> str:
    """The normal form of a JSON value; of a text that is none, the text's."""
    value = fields.parse(answer)
    return text(answer) if value is fields.INVALID else fields.canonical(value)


# Functions of a module, as processes that prepare rows are sent them.
FORMS: Mapping[Answer, Callable[[str], str]] = {
    "text": text,
    "latex": latex.normalize,
    "json": as_json,
    "label": text,
}
