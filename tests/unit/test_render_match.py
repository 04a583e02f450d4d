"""Render match: equal pictures match whatever their source, and what cannot be drawn is counted."""

import pytest

from job.evaluation.render_match import LONGEST, compare, summarize

SAME = [
    (r"x \le y", r"x\leq y"),
    (r"x^2", r"{x}^{ 2 }"),
    (r"$a+b$", r"a + b"),
    (r"{a \over b}", r"\frac{a}{b}"),
    (r"\left( x \right)", r"(x)"),
    (r"a\,b", r"ab"),
]
DIFFERENT = [
    ("x", "y"),
    ("x^{2}", "x_{2}"),
    ("a+b", "a-b"),
    ("ab", "a"),
    (r"\alpha", "a"),
    (r"\frac{a}{b}", r"\frac{b}{a}"),
]


@pytest.mark.parametrize(("prediction", "label"), SAME)
def test_the_same_picture_by_another_source_matches(prediction: str, label: str) -> None:
    assert compare(prediction, label) == "match"


@pytest.mark.parametrize(("prediction", "label"), DIFFERENT)
def test_another_picture_does_not_match(prediction: str, label: str) -> None:
    assert compare(prediction, label) == "differs"


@pytest.mark.parametrize("prediction", ["", r"\frac{a", r"\begin{array}", "x" * (LONGEST + 1)])
def test_a_prediction_that_cannot_be_drawn_is_no_match(prediction: str) -> None:
    assert compare(prediction, "x") == "failed"


def test_a_label_that_cannot_be_drawn_is_left_out_of_the_share_and_counted() -> None:
    assert compare("x", r"\begin{array}") == "skipped"
    counted = summarize(["match", "match", "differs", "failed", "skipped"])
    assert counted.render_match == 0.5
    assert (counted.render_skipped, counted.render_failed) == (1, 1)
    assert summarize(["skipped"]).render_match is None


@pytest.mark.parametrize(
    "text", ["\0", "\ud800", "é" * 900, "{" * 900, r"\hspace{9999999in}xy", "$"]
)
def test_nothing_that_a_model_writes_raises(text: str) -> None:
    assert compare(text, "x") in ("failed", "differs")
