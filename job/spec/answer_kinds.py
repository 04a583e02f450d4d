"""The kinds of answers (`eval.answer`) and the metrics of each."""

from collections.abc import Mapping
from typing import Literal

Answer = Literal["text", "latex", "json", "label"]

METRICS: Mapping[Answer, tuple[str, ...]] = {
    "text": ("exact_match", "exact_match_normalized", "cer", "wer", "bleu"),
    "latex": (
        "exact_match",
        "exact_match_normalized",
        "cer",
        "token_edit_distance",
        "bleu",
        "render_match",
    ),
    "json": (
        "valid_json",
        "exact_object",
        "field_precision",
        "field_recall",
        "field_f1",
        "exact_match",
        "cer",
    ),
    "label": ("accuracy", "macro_f1"),
}
"""The metrics by kind of answer; all are computed unless `eval.metrics` selects some."""

REWARDS: Mapping[str, tuple[Answer, ...]] = {
    "exact_match": ("text", "latex", "json", "label"),
    "character_accuracy": ("text", "latex", "json", "label"),
    "render_match": ("latex",),
    "valid_latex": ("latex",),
    "valid_json": ("json",),
    "field_f1": ("json",),
    "label_accuracy": ("label",),
    "length": ("text", "latex", "json", "label"),
}
"""The rewards of `reinforce`, with the kinds of answers that each applies to."""

LOSS = "loss"
LOWER_IS_BETTER = frozenset({LOSS, "cer", "wer", "token_edit_distance"})
"""The metrics that measure errors; of all others, higher values are better."""

ALL_METRICS = frozenset({LOSS, *(name for metrics in METRICS.values() for name in metrics)})
"""Names of all metrics. The other values in a run's `metrics` are row counts."""


RIGHT = ("accuracy", "exact_object", "exact_match_normalized", "exact_match")
"""Metrics that are shares of right answers, from the most to the least telling. Of formulas,
render_match tells more, where they can be rendered."""


def bare_metric(name: str | None) -> str:
    """A metric's name without the prefix `eval_` that Transformers adds; None is the loss."""
    return LOSS if name is None else name.removeprefix("eval_")
