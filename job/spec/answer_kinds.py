"""The kinds of answers that `eval.answer` names, and which metrics judge each."""

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
"""Those that fit; all of them are measured unless `eval.metrics` names some."""

MEASURED = frozenset({"loss", *(name for metrics in METRICS.values() for name in metrics)})
"""Every metric there is. What stands beside them among a run's metrics counts rows."""
