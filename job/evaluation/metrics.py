"""Metrics for text and formulas: exact match, edit rates and BLEU.

| metric | unit | definition |
|---|---|---|
| `exact_match` | fraction of rows, 0 to 1 | prediction equals label, up to surrounding white space |
| `exact_match_normalized` | fraction of rows, 0 to 1 | both have the same normal form (`job.evaluation.answer_kinds`) |
| `cer` | edits per character | Levenshtein distance in characters, summed over all rows, divided by the labels' characters; on raw text, surrounding white space stripped |
| `token_edit_distance` | edits per token | the same in LaTeX tokens, on normal forms |
| `wer` | edits per word | the same in white-space-separated words, on normal forms |
| `bleu` | 0 to 100 | corpus BLEU-4 on normal forms: LaTeX tokens, or words and punctuation |
| `render_match` | fraction of rows, 0 to 1 | both render to the same image (`job.evaluation.render_match`) |

Edit rates weight rows by length, as is usual for character error rates, and exceed 1 if predictions
run far beyond their labels. Levenshtein distance counts insertions, deletions and substitutions as 1
each (rapidfuzz). BLEU is sacreBLEU's with its default smoothing (`exp`), orders 1 to 4 and brevity
penalty. Formulas are tokenized by `latex.tokenize` and text by sacreBLEU's `13a`, not by the model's
tokenizer, so values compare across models.
"""  # noqa: E501  a table's row is one line

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from job.evaluation import answer_kinds, latex

TextKind = Literal["text", "latex"]
"""The kinds of answers that are compared as text."""


@dataclass(frozen=True)
class RowScore:
    """The score of one prediction."""

    exact_match: bool
    exact_match_normalized: bool
    cer: float
    """`edits` per character of the label; an empty label counts as one character."""
    edits: int
    characters: int
    """Characters of the stripped label."""
    token_edits: int
    tokens: int
    """LaTeX tokens, or words, of the normalized label."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics over all rows; None if not requested, or without rows."""

    rows: int
    exact_match: float | None = None
    exact_match_normalized: float | None = None
    cer: float | None = None
    token_edit_distance: float | None = None
    wer: float | None = None
    bleu: float | None = None


def exact(prediction: str, label: str) -> bool:
    """Whether the prediction equals its label, up to surrounding white space."""
    return prediction.strip() == label.strip()


def cer(prediction: str, label: str) -> float:
    """Edits per character of the label; an empty label counts as one character."""
    return _rate(_edits(prediction, label), len(label.strip()))


def score(prediction: str, label: str, kind: TextKind) -> RowScore:
    """Scores one prediction against its label."""
    from rapidfuzz.distance import Levenshtein

    prediction, label = prediction.strip(), label.strip()
    predicted, expected = _tokens(prediction, kind), _tokens(label, kind)
    edits = _edits(prediction, label)
    return RowScore(
        exact_match=exact(prediction, label),
        exact_match_normalized=predicted == expected,
        cer=_rate(edits, len(label)),
        edits=edits,
        characters=len(label),
        token_edits=Levenshtein.distance(predicted, expected),
        tokens=len(expected),
    )


def summarize(
    rows: Sequence[RowScore],
    predictions: Sequence[str],
    labels: Sequence[str],
    metrics: Sequence[str],
    kind: TextKind,
) -> Metrics:
    """The named metrics over all rows; `rows` are the scores of `predictions` against `labels`."""
    assert len(rows) == len(predictions) == len(labels), "one score, prediction and label per row"
    if not rows:
        return Metrics(rows=0)
    values: dict[str, float] = {}
    for name in metrics:
        match name:
            case "exact_match":
                values[name] = sum(row.exact_match for row in rows) / len(rows)
            case "exact_match_normalized":
                values[name] = sum(row.exact_match_normalized for row in rows) / len(rows)
            case "cer":
                edits = sum(row.edits for row in rows)
                values[name] = _rate(edits, sum(row.characters for row in rows))
            case "token_edit_distance" | "wer":
                edits = sum(row.token_edits for row in rows)
                values[name] = _rate(edits, sum(row.tokens for row in rows))
            case "bleu":
                values[name] = _bleu(predictions, labels, kind)
            case _:
                raise AssertionError(f"unknown metric {name}; the spec's schema names them")
    return Metrics(rows=len(rows), **values)


def _tokens(text: str, kind: TextKind) -> tuple[str, ...]:
    return (
        latex.normalized_tokens(text) if kind == "latex" else tuple(answer_kinds.text(text).split())
    )


def _edits(prediction: str, label: str) -> int:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(prediction.strip(), label.strip())


def _rate(edits: int, length: int) -> float:
    return edits / max(1, length)


def _bleu(predictions: Sequence[str], labels: Sequence[str], kind: TextKind) -> float:
    from sacrebleu.metrics import BLEU

    # LaTeX is already tokenized: `force` silences the warning about it.
    # `effective_order` matters only if no row has four tokens: without 4-grams, BLEU would be 0.
    tokenizer = "none" if kind == "latex" else "13a"
    bleu = BLEU(tokenize=tokenizer, force=True, smooth_method="exp", effective_order=True)
    hypotheses, references = (
        [" ".join(_tokens(text, kind)) for text in texts] for texts in (predictions, labels)
    )
    return min(100.0, bleu.corpus_score(hypotheses, [references]).score)  # 100.00000000000004
