"""Rewards of any kind of answer: equality, character accuracy and length."""

from job.evaluation import answer_kinds, metrics

SPARE = 0.25
"""An answer may exceed its reference by this fraction before `length` falls."""
SHORTEST_FALL = 8
"""`length` falls over as many characters as the reference has, and at least these."""


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer equals its reference, surrounding white space aside."""
    return float(metrics.exact(answer, reference))


def character_accuracy(answer: str, reference: str) -> float:
    """1 − CER, and 0 if there are more edits than the reference has characters."""
    return max(0.0, 1.0 - metrics.cer(answer, reference))


def label_accuracy(answer: str, reference: str) -> float:
    """1 if the answer is the class that the reference names, in normal form."""
    return float(answer_kinds.text(answer) == answer_kinds.text(reference))


def length(answer: str, reference: str) -> float:
    """1 up to the reference's length and a quarter; run-ons lose until they have twice as much.

    An answer of no characters gets 0 unless its reference has none either.
    """
    written, expected = len(answer.strip()), len(reference.strip())
    if not written:
        return float(not expected)
    excess = written - (1 + SPARE) * expected
    return min(1.0, max(0.0, 1.0 - excess / max(expected, SHORTEST_FALL)))
