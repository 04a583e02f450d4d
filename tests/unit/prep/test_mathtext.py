"""The faster parser draws the pixels that matplotlib's own draws."""

import logging
import warnings
from collections.abc import Iterator
from functools import cache

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import _mathtext
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser

from job.prep.formulas import mathtext

FONT = FontProperties(family="DejaVu Sans", size=20, math_fontfamily="cm")
FAILED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)

READ = r"""
x+1
a-b=-c
a , b.c;d!e 1.5 f(2,3)
x^{2}_{i}
x_{i}^{2}y_{j+1}
{x}^{2}{}^{3}
^{a}b
\alpha\beta x\leq\infty
\sum_{i=1}^{n}x_{i}^{2}\prod_{k}\int_{0}^{\infty}f
\lim_{x\rightarrow 0}\sin x+\sin^{2}x+\max(a,b)\exp\Pr
\sin^{+}-1
\frac{a}{b}+\frac{\frac{1}{x}}{1-x^{2}}
\binom{n}{k}
\sqrt{x}\sqrt[3]{x+1}\sqrt[a_{1}]{\frac{b}{c}}
\hat{x}\bar{ab}\vec{v}\dot{q}\ddot{q}\tilde{y}\widehat{abc}\widetilde{xy}\mathring{A}
\overline{x+y}\underline{ab}
\overset{a}{b}\underset{x\rightarrow 0}{\lim}
\boldsymbol{\alpha+x}
\mathrm{d}x\mathbf{v}\mathcal{L}\mathbb{R}\mathfrak{g}\mathit{f}\mathsf{s}\mathtt{t}
\mathrm{ab\mathbf{c}}d
\{a\}\|x\|\_\%\$\[\]
\langle x\rangle|y|/z<a>b:c?@
{a{b{c{d}}}}
x^{y^{z^{w}}}
a\,b\;c\!d\quad e\qquad f\ g~h
\not=\ldots\cdots\prime
""".strip().splitlines()
"""What `Parser` reads by itself."""

LEFT = r"""
\left(\frac{a}{b}\right]
\text{a b}\operatorname{foo}
f'(x)
{\rm d}x{\bf v}
\hspace{1}x
\quadx
\dfrac{a}{b}
\substack{a\\b}
x^ 2
\sqrt {x}
""".strip().splitlines()
"""What `Parser` leaves to mathtext."""

FAIL = r"""
{
}
{a
a}
x^
x_{a}_{b}
\frac{a
\frac{}{b}
\frac a b
\sqrt
\sqrt{}
\hat
\nosuch
\stackrel{a}{b}
\begin{array}{c}x\end{array}
a\\b
\left(a
x"y
a\&b
#
\alpha\
\leftx
\fraction{a}{b}
\overline x
""".strip().splitlines()
"""What nobody can draw."""


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings(), mpl.rc_context({"mathtext.default": "normal"}):
        yield


def drawn(text: str) -> np.ndarray | None:
    try:
        return mathtext.draw(text, FONT, 144)
    except FAILED:
        return None


@cache
def reference_grammar() -> _mathtext.Parser:
    return _mathtext.Parser()


def drawn_by_matplotlib(text: str) -> np.ndarray | None:
    grammar = reference_grammar()
    grammar._needs_space_after_subsuper = False  # the mark of a formula that failed
    reference = type("Reference", (MathTextParser,), {"_parser": grammar})
    try:
        drawn = reference("agg").parse(f"${text}$", dpi=144, prop=FONT, antialiased=True)
    except FAILED:
        return None
    return np.asarray(drawn.image)


def test_the_installed_matplotlib_is_one_whose_grammar_is_followed() -> None:
    assert mathtext.is_covered()


@pytest.mark.parametrize("text", [*READ, *LEFT, *FAIL])
def test_every_pixel_is_matplotlibs(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn_by_matplotlib(text)
    own = _mathtext.Parser.parse
    left = []

    def parse(self: _mathtext.Parser, s: str, *rest: object) -> _mathtext.Hlist:
        left.append(s)
        return own(self, s, *rest)

    monkeypatch.setattr(_mathtext.Parser, "parse", parse)
    found = drawn(text)
    assert (found is None) == (expected is None) == (text in FAIL)
    assert found is None or expected is None or np.array_equal(found, expected)
    assert text in FAIL or (left != []) == (text in LEFT)


def test_a_formula_that_fails_leaves_no_mark_on_the_next() -> None:
    before = drawn("x+y")
    assert drawn(r"\sin^{a") is None
    assert drawn(r"f'\sin^") is None
    after = drawn("x+y")
    assert before is not None
    assert after is not None
    assert np.array_equal(before, after)


def test_an_unknown_matplotlib_draws_by_its_own_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn(r"\frac{a}{b}")
    monkeypatch.setattr(mathtext, "is_covered", lambda: False)
    monkeypatch.setattr(mathtext.Parser, "_read", None)  # a call would fail
    found = drawn(r"\frac{a}{b}")
    assert found is not None
    assert expected is not None
    assert np.array_equal(found, expected)


def test_deep_groups_are_left_to_mathtext_and_deeper_ones_fail() -> None:
    assert drawn("{" * 14 + "x" + "}" * 14) is not None
    assert drawn("{" * 200 + "x" + "}" * 200) is None
