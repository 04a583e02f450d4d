"""Rewards of JSON answers, by the rules of `job.evaluation.fields`.

Of a key that an object has twice, the last value counts, as in Python and JavaScript.
"""

from job.evaluation import fields


def valid_json(answer: str, reference: str) -> float:
    """1 if the answer is JSON, and nothing else."""
    return float(fields.parse(answer) is not fields.INVALID)


def field_f1(answer: str, reference: str) -> float:
    """The F1 of the answer's fields; 0 for all answers if the reference is not JSON."""
    scored, _, _ = fields.score(answer, reference)
    return scored.field_f1 if scored.label_is_json else 0.0
