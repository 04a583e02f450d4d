"""Render match: comparing rendered formulas."""

import random
import time
from collections.abc import Iterator

import numpy as np
import pytest

from job.evaluation import latex
from job.evaluation.render_match import (
    MAX_CHARACTERS,
    SLACK,
    RenderMatch,
    compare,
    render,
    same_image,
    summarize,
)
from job.prep.formulas import grammar, mathtext


@pytest.mark.parametrize(
    ("prediction", "label"),
    [
        (r"a\le b", r"a\leq b"),
        (r"x\to y", r"x \rightarrow y"),
        ("x^2", "{x}^{ 2 }"),
        ("x^2_1", "x_{1}^{2}"),
        (r"a\,b \quad c", "abc"),
        (r"{a \over b}", r"\frac{a}{b}"),
        (r"\mathrm{sin}x", r"\sin x"),
        ("$x+1$", "x+1"),
        ("$$x+1$$", "x+1"),
        (r"\[ x+1 \]", "x+1"),
        (r"\(x+1\)", "x+1"),
        ("  x+1\n", "x+1"),
    ],
)
def test_one_picture_by_two_sources_is_a_match(prediction: str, label: str) -> None:
    assert compare(prediction, label) == "match"
    assert compare(label, prediction) == "match"


@pytest.mark.parametrize(
    ("prediction", "label"),
    [
        ("a.b", "a,b"),
        (":", ";"),
        ("1", "l"),
        ("0", "o"),
        ("c", "C"),
        ("i", r"\imath"),
        ("v", r"\nu"),
        ("x-y", "x=y"),
        ("x2", "x^{2}"),
        ("x_{1}", "x_{l}"),
        ("a", "a'"),
        (r"\dot{a}", r"\ddot{a}"),
        (r"\mathbf{x}", "x"),
        (r"\Sigma", r"\sum"),
        (r"\phi", r"\varphi"),
        (r"\frac{a}{b}", r"\frac{b}{a}"),
        ("a+b+c+d+e+f+g+1", "a+b+c+d+e+f+g+7"),
    ],
)
def test_small_differences_are_seen(prediction: str, label: str) -> None:
    assert compare(prediction, label) == "differs"


@pytest.mark.parametrize(
    "prediction",
    [
        "",
        " ",
        r"\frac{a",
        "}" * 48,
        r"\nosuchcommand",
        "x\0",
        "漢",
        "\u202eab",
        "\ud800",
    ],
)
def test_a_prediction_that_cannot_be_drawn_fails(prediction: str) -> None:
    assert compare(prediction, "x") == "failed"


@pytest.mark.parametrize("label", ["", r"\begin{array}{c}x\end{array}", r"\frac{a", "字"])
def test_a_label_that_cannot_be_drawn_is_skipped_whatever_the_prediction(label: str) -> None:
    assert compare(label, label) == "skipped"
    assert compare("x", label) == "skipped"


def test_what_was_not_compared_is_counted() -> None:
    outcomes = [compare(p, t) for p, t in [("x", "x"), ("y", "x"), ("{", "x"), ("x", "{")]]
    assert summarize(outcomes) == RenderMatch(render_match=1 / 3, render_skipped=1, render_failed=1)
    assert summarize(["skipped"]) == RenderMatch(
        render_match=None, render_skipped=1, render_failed=0
    )
    assert summarize([]) == RenderMatch(render_match=None, render_skipped=0, render_failed=0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "prediction",
    [
        "x" * 5_000,
        "x" * (MAX_CHARACTERS + 1),
        "{" * 5_000,
        r"\frac{" * 150,
        r"\left(" * 160,
        r"\sqrt{" * 120 + "x" + "}" * 120,
        "x^{" * 200 + "}" * 200,
        r"\hspace{10000000}" + "}",  # unreadable, so the space stays: gigabytes if it were drawn
        "x" * MAX_CHARACTERS,
    ],
    ids=lambda text: f"{text[:12]}x{len(text)}",
)
def test_no_prediction_takes_a_second(prediction: str) -> None:
    compare("x", "x")  # the first picture imports matplotlib
    started = time.process_time()
    assert compare(prediction, "x") in ("failed", "differs")
    assert time.process_time() - started < 1


def test_an_ordinary_row_takes_milliseconds() -> None:
    label = r"\frac{\partial u}{\partial t}+\sum_{i=1}^{n}x_{i}^{2}=\sqrt{a+b}\leq\alpha"
    compare(label, label)
    started = time.process_time()
    for _ in range(10):
        assert compare(label, label) == "match"
    assert (time.process_time() - started) / 10 < 0.2


def test_the_tolerance_is_one_pixel_of_place_and_two_of_size() -> None:
    block = np.ones((10, 10), bool)
    assert same_image(block, np.ones((11, 11), bool))
    assert not same_image(block, np.ones((10, 10 + SLACK), bool))  # its edge is two pixels off
    assert not same_image(block, np.ones((10, 11 + SLACK), bool))
    hole = block.copy()
    hole[4:6, 4:6] = False  # each pixel of it touches ink
    assert same_image(block, hole)
    hole[3:6, 3:6] = False  # its middle does not
    assert not same_image(block, hole)
    assert not same_image(hole, block)


def test_the_picture_is_given_for_people_too() -> None:
    small, large = render("x+1", 14, 110), render("x+1")
    assert small is not None
    assert large is not None
    assert small.width < large.width
    assert render("x" * 5_000) is None


def pairs() -> Iterator[tuple[str, str]]:
    """A hundred answers and labels: near misses, truncated, garbage, and with another ending."""
    rng = random.Random(5)
    labels = [grammar.to_latex(grammar.formula(rng, rng.randint(3, 30))) for _ in range(100)]
    tokens = [token for label in labels for token in latex.tokenize(label)]
    for number, label in enumerate(labels):
        answer = list(latex.tokenize(label))
        match number % 4:
            case 0:
                answer[rng.randrange(len(answer))] = rng.choice(tokens)
            case 1:
                answer = answer[: rng.randrange(1, len(answer))]
            case 2:
                answer = rng.choices(tokens, k=40)
            case 3:
                answer += rng.choices([" ", r"\,", r"\nosuch", "{}", r"\right)"], k=1)
        yield latex.join(answer), label


def test_a_hundred_answers_compare_as_by_matplotlibs_own_parser() -> None:
    """The outcomes were written by the parser of matplotlib 3.11.2 alone."""
    assert "".join(compare(*pair)[0] for pair in pairs()) == (
        "fdfmdffdddfmddfdddfmdffmfdfmfffffffmfffmfdfffdfmfffffffmddfdffff"
        "mdffdffddffmdffmdffmdffmfdfdfdfdddfd"
    )


def test_labels_are_not_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    label = r"a_{77}+\frac{b}{c}"
    assert compare("a", label) == "differs"
    monkeypatch.setattr(mathtext, "draw", None)  # a call would fail, and the label be skipped
    assert compare(r"{a}_{77} + \dfrac bc", label) == "match"
    assert compare("a", label) == "differs"
