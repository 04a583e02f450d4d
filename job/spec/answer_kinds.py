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

ALL_METRICS = frozenset({"loss", *(name for metrics in METRICS.values() for name in metrics)})
"""Names of all metrics. The other values in a run's `metrics` are row counts."""
