"""What is said of a result that should not look normal."""

import pytest

from job.evaluation.report.doubts import doubts

NO_BETTER = "the trained model is better by no metric than the one before training"
NEVER_RIGHT = (
    "the trained model answers no held-out row correctly ({} is 0): it may need more steps"
)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"loss": 2.0, "exact_match": 0.0}, {"loss": 1.0, "exact_match": 0.1}, ()),
        ({"loss": 2.0, "cer": 0.5}, {"loss": 2.0, "cer": 0.6}, (NO_BETTER,)),
        ({"loss": 2.0}, {"loss": float("nan")}, (NO_BETTER,)),
        (
            {"loss": 2.0, "accuracy": 0.0},
            {"loss": 1.0, "accuracy": 0.0},
            (NEVER_RIGHT.format("accuracy"),),
        ),
        (
            {"loss": 1.0, "exact_match": 0.2},
            {"loss": 1.5, "exact_match": 0.0},
            (NO_BETTER, NEVER_RIGHT.format("exact_match")),
        ),
        (None, {"loss": 9.0, "exact_match": 0.0}, (NEVER_RIGHT.format("exact_match"),)),
        (None, {"loss": 9.0, "exact_match_normalized": 0.1, "exact_match": 0.0}, ()),
        (None, {"loss": 9.0}, ()),
    ],
)
def test_doubts(
    before: dict[str, float] | None, after: dict[str, float], expected: tuple[str, ...]
) -> None:
    assert doubts(before, after) == expected
