"""LaTeX tokens, and the normal form of formulas."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from job.evaluation.latex import join, normalize, normalized_tokens, tokenize

PIECES = (
    *(
        "a",
        "b",
        "x",
        "1",
        "2",
        "+",
        "=",
        "<",
        "{",
        "}",
        "{",
        "}",
        "^",
        "_",
        "'",
        "&",
        "[",
        "]",
        "(",
        ")",
    ),
    *(
        " ",
        "~",
        "$",
        "*",
        ".",
        "|",
        "\\",
        r"\ ",
        r"\,",
        r"\\",
        r"\{",
        r"\}",
        r"\[",
        "{}",
        "{a}",
        "{ab}",
    ),
    *(r"\alpha", r"\sin", r"\frac", r"\sqrt", r"\hat", r"\over", r"\atop", r"\choose", r"\left"),
    *(
        r"\right",
        r"\rm",
        r"\bf",
        r"\mathrm",
        r"\mathbf",
        r"\text",
        r"\operatorname",
        r"\not",
        r"\in",
    ),
    *(r"\prime", r"\le", r"\to", r"\sp", r"\sb", r"\label", r"\tag", r"\hspace", r"\kern", "1em"),
    *(r"\begin", r"\end", "{array}", "{math}", "{cc}", r"\big", r"\quad", r"\limits", r"\color"),
)


@pytest.mark.parametrize(
    ("latex", "tokens"),
    [
        (r"\frac{a}{b}", (r"\frac", "{", "a", "}", "{", "b", "}")),
        (r"\alpha x", (r"\alpha", "x")),
        (r"\alphax", (r"\alphax",)),
        (r"\{a\}\\", (r"\{", "a", r"\}", r"\\")),
        ("a \t\n b", ("a", "b")),
        ("a\\ b", ("a", "\\ ", "b")),
        ("a\\\nb", ("a", "\\ ", "b")),
        ("x\\", ("x", "\\")),
        ("", ()),
        ("é→", ("é", "→")),
    ],
)
def test_tokenize_splits_commands_escapes_and_characters(
    latex: str, tokens: tuple[str, ...]
) -> None:
    assert tokenize(latex) == tokens


@pytest.mark.parametrize(
    ("latex", "normal"),
    [
        # braces and scripts
        ("x^2", "x^{2}"),
        ("{x}^{ 2 }", "x^{2}"),
        ("{{x}}", "x"),
        ("{x+{y}}z", "x+yz"),
        ("{ab}^2", "{ab}^{2}"),
        ("{x^2}^3", "{x^{2}}^{3}"),
        ("x^{a}_{b}", "x_{b}^{a}"),
        (r"x^\alpha_\beta", r"x_{\beta}^{\alpha}"),
        (r"x^\frac12", r"x^{\frac{1}{2}}"),
        ("x^ab", "x^{a}b"),
        (r"x\sp 2\sb i", "x_{i}^{2}"),
        ("x^{}", "x"),
        ("{}^2", "{}^{2}"),
        ("^2", "{}^{2}"),
        (r"T^{a}{}_{b}", "T^{a}{}_{b}"),
        ("x^a^b", "x^{a}{}^{b}"),
        ("f'", r"f^{\prime}"),
        ("f''_i", r"f_{i}^{\prime\prime}"),
        ("f'^2", r"f^{\prime2}"),
        (r"f^\prime", r"f^{\prime}"),
        # what draws nothing
        (r"a\,b\;c\!d\:e\>f\ g~h", "abcdefgh"),
        (r"a\quad b\qquad c\hspace{1cm}d\hspace*{-2pt}e\kern 1em f\hskip-3.5mm g", "abcdefg"),
        (r"\left(a\right)", "(a)"),
        (r"\left.a\right|_0", "a|_{0}"),
        (r"\left<a\right>", r"\langle a\rangle"),
        (r"\bigl(a\Bigr)", "(a)"),
        (r"\displaystyle\sum\limits_i x", r"\sum_{i}x"),
        (r"x=1\label{eq:1}\tag{2}\nonumber", "x=1"),
        (r"\tag*{A}x", "x"),
        ("$x$", "x"),
        (r"\[x\]", "x"),
        (r"\begin{equation}x\end{equation}", "x"),
        ("x\\", "x"),
        # synonyms
        (r"a\le b\ge c\ne d\to e", r"a\leq b\geq c\neq d\rightarrow e"),
        (r"\lbrace a\rbrace\lbrack b\rbrack", r"\{a\}[b]"),
        (r"\lvert x\rvert\Vert y\rVert", r"|x|\|y\|"),
        (r"\dfrac ab\tfrac12", r"\frac{a}{b}\frac{1}{2}"),
        (r"a\not=b\not\in c", r"a\neq b\notin c"),
        (r"\hat x\vec{ab}", r"\hat{x}\vec{ab}"),
        (r"\sqrt2\sqrt[3]x", r"\sqrt{2}\sqrt[3]{x}"),
        # infix commands
        (r"{a\over b}", r"\frac{a}{b}"),
        (r"1+{a+b\over{c}}^2", r"1+\frac{a+b}{c}^{2}"),
        (r"\left(a\over b\right)", r"(\frac{a}{b})"),
        (r"a\over b", r"\frac{a}{b}"),
        (r"{n\choose k}", r"\binom{n}{k}"),
        (r"{a\atop b}c", r"{a\atop b}c"),
        # fonts
        (r"{\rm d}x", r"\mathrm{d}x"),
        (r"\rm d x", r"\mathrm{dx}"),
        (r"{\bf a\rm b}", r"\mathbf{a}\mathrm{b}"),
        (r"\text{if }x\mbox{or}", r"\mathrm{if}x\mathrm{or}"),
        (r"\mathrm a\,\mathrm{b}", r"\mathrm{ab}"),
        (r"\mathrm{\mathrm{a}b}", r"\mathrm{ab}"),
        (r"{\cal L}", r"\mathcal{L}"),
        (r"\bm{x}", r"\boldsymbol{x}"),
        (r"\mathop{\rm lim}_{x}", r"\lim_{x}"),
        (r"\operatorname*{argmin}_x", r"\mathrm{argmin}_{x}"),
        (r"{\rm a\over b}", r"\frac{\mathrm{a}}{\mathrm{b}}"),
        # tables
        (
            r"\begin{array}{c|c} a & {\bf b} \\ c & d \end{array}",
            r"\begin{array}{c|c}a&\mathbf{b}\\c&d\end{array}",
        ),
    ],
)
def test_each_rule_gives_one_spelling(latex: str, normal: str) -> None:
    assert normalize(latex) == normal
    assert normalize(normal) == normal


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("x^2", "x_2"), ("ab^2", "{ab}^2"), (r"\alpha", "a"), (r"\frac ab", "ab"), ("a", "A")),
        *((r"\bar x", r"\overline x"), (r"\mathrm d", "d"), ("T^a{}_b", "T^a_b"), ("-", "=")),
    ],
)
def test_what_draws_differently_stays_different(one: str, other: str) -> None:
    assert normalize(one) != normalize(other)


@pytest.mark.parametrize(
    "latex",
    [
        *("{x", "x}", "}{", "x^", r"\frac{a}", r"\sqrt[3", "x^^2", r"\begin", "x_}", r"\le {"),
        *(r"a\over b\over c", r"\label{x"),
    ],
)
def test_unreadable_text_keeps_its_tokens(latex: str) -> None:
    assert normalized_tokens(latex) == tokenize(latex)
    assert normalize(latex) == join(tokenize(latex))


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example(r"\not{}=")
@example(r"\begin{array}\mathrm{}{ab}^2")
@example(r"\sqrt[\left[x\right]]y")
@example("x^{}^2")
@example("{&}^2")
@example(r"\left\text1")
def test_normalizing_twice_changes_nothing_more(latex: str) -> None:
    once = normalize(latex)
    assert normalize(once) == once
    assert tokenize(once) == normalized_tokens(latex)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_a_normal_form(latex: str) -> None:
    once = normalize(latex)
    assert normalize(once) == once
    assert tokenize(join(tokenize(latex))) == tokenize(latex)


@pytest.mark.parametrize(
    "latex",
    [
        *("{" * 20_000, "{" * 9_000 + "}" * 9_000, "x^" * 10_000, r"\hat" * 5_000 + "x"),
        *("'" * 20_000, r"\rm a" * 4_000, r"\left(" * 4_000, "{a}" * 6_000, r"\frac" * 4_000),
        *(r"\mathrm{a}" * 2_000, "{" * 40 + r"\rm a" * 3_000 + "}" * 40, r"\label" * 3_000),
    ],
)
@pytest.mark.timeout(60)  # what grows with the square or worse takes longer
def test_long_and_deep_text_is_quick(latex: str) -> None:
    once = normalize(latex)
    assert normalize(once) == once
