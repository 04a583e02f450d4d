"""How near answers are to their labels as text or as formulas: exact match, edit rates and BLEU.

| metric | unit | definition |
|---|---|---|
| `exact_match` | share of rows, 0 to 1 | prediction and label are the same text, but for white space around them |
| `exact_match_normalized` | share of rows, 0 to 1 | both have the same normal form (`job.evaluation.answer_kinds`) |
| `cer` | edits per character | Levenshtein distance in characters, summed over all rows, by the labels' characters; raw texts, white space around them aside |
| `token_edit_distance` | edits per token | the same in LaTeX tokens, of the normal forms |
| `wer` | edits per word | the same in words: what white space parts in the normal forms |
| `bleu` | 0 to 100 | corpus BLEU-4 of the normal forms' LaTeX tokens, or of text in words and signs |
| `render_match` | share of rows, 0 to 1 | both draw the same picture (`job.evaluation.render_match`) |

Edit rates weigh a row by its length, as is usual for character error rates, and pass 1 where
predictions run on far beyond their labels. Levenshtein distance counts insertions, deletions and
substitutions, each as 1 (rapidfuzz). BLEU is sacreBLEU's with its own smoothing (`exp`: an order
without a match counts as half, a quarter, … of one), orders 1 to 4 and the brevity penalty. Tokens
of formulas are those of `latex.tokenize`, of text those of sacreBLEU's own tokenizer (`13a`), not the
model's, so values compare across models.
"""  # noqa: E501  a table's row is one line

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from job.evaluation import answer_kinds, latex

Written = Literal["text", "latex"]
"""What is compared by what is written."""


@dataclass(frozen=True)
class RowScore:
    """One prediction against its label."""

    exact_match: bool
    exact_match_normalized: bool
    cer: float
    """`edits` per character of the label; an empty label counts as one character."""
    edits: int
    characters: int
    """The label's, without white space around it."""
    token_edits: int
    tokens: int
    """The label's, in its normal form: LaTeX's tokens, or words."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """All rows together; None where a metric was not asked for, or where there are no rows."""

    rows: int
    exact_match: float | None = None
    exact_match_normalized: float | None = None
    cer: float | None = None
    token_edit_distance: float | None = None
    wer: float | None = None
    bleu: float | None = None


def score(prediction: str, label: str, kind: Written) -> RowScore:
    """Compares one prediction with its label."""
    from rapidfuzz.distance import Levenshtein

    prediction, label = prediction.strip(), label.strip()
    predicted, expected = _tokens(prediction, kind), _tokens(label, kind)
    edits = Levenshtein.distance(prediction, label)
    return RowScore(
        exact_match=prediction == label,
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
    kind: Written,
) -> Metrics:
    """The named metrics over all rows; predictions and labels are those that `rows` scored."""
    assert len(rows) == len(predictions) == len(labels), "one score, prediction and label a row"
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


def _tokens(text: str, kind: Written) -> tuple[str, ...]:
    return (
        latex.normalized_tokens(text) if kind == "latex" else tuple(answer_kinds.text(text).split())
    )


def _rate(edits: int, length: int) -> float:
    return edits / max(1, length)


def _bleu(predictions: Sequence[str], labels: Sequence[str], kind: Written) -> float:
    from sacrebleu.metrics import BLEU

    # LaTeX is already split; `tokenize` must then not split it again, and `force` takes it so.
    # `effective_order` matters only where no row has four tokens: no 4-gram is not a wrong one.
    tokenizer = "none" if kind == "latex" else "13a"
    bleu = BLEU(tokenize=tokenizer, force=True, smooth_method="exp", effective_order=True)
    hypotheses, references = (
        [" ".join(_tokens(text, kind)) for text in texts] for texts in (predictions, labels)
    )
    return min(100.0, bleu.corpus_score(hypotheses, [references]).score)  # 100.00000000000004
