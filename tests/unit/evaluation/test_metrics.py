"""Exact match, edit rates and BLEU."""

import pytest
from sacrebleu.metrics import BLEU

from job.evaluation import metrics
from job.evaluation.metrics import Metrics, RowScore, TextKind, summarize

NAMES = ("exact_match", "exact_match_normalized", "cer", "token_edit_distance", "bleu")


def score(prediction: str, label: str) -> RowScore:
    return metrics.score(prediction, label, "latex")


def judge(
    pairs: list[tuple[str, str]], names: tuple[str, ...] = NAMES, kind: TextKind = "latex"
) -> Metrics:
    rows = [metrics.score(prediction, label, kind) for prediction, label in pairs]
    return summarize(rows, [pair[0] for pair in pairs], [pair[1] for pair in pairs], names, kind)


def test_a_row_is_counted_in_characters_and_in_normal_tokens() -> None:
    row = score(" x^2+a ", r"x^{2}+\alpha")
    assert not row.exact_match
    assert not row.exact_match_normalized
    assert (row.edits, row.characters) == (7, 12)  # two braces; \, l, p, h and the second a
    assert (row.token_edits, row.tokens) == (1, 7)
    assert row.cer == 7 / 12


def test_white_space_around_a_text_does_not_count() -> None:
    row = score("  x+1\n", "x+1")
    assert row.exact_match
    assert row.edits == 0


def test_another_spelling_is_exact_only_in_the_normal_form() -> None:
    row = score(r"{a \over b}", r"\frac{a}{b}")
    assert not row.exact_match
    assert row.exact_match_normalized
    assert row.edits > 0
    assert row.token_edits == 0


def test_rates_are_sums_over_sums_not_means_of_rates() -> None:
    result = judge([("b", "a"), ("x+y+z+1+2", "x+y+z+1+2")])
    assert result.cer == 1 / 10
    assert result.token_edit_distance == 1 / 10
    assert result.exact_match == 0.5


def test_a_perfect_corpus_scores_one_and_a_hundred() -> None:
    result = judge([(r"\frac{a}{b}", r"\frac{a}{b}"), ("x^2", "x^{2}")])
    assert result == Metrics(
        rows=2,
        exact_match=0.5,
        exact_match_normalized=1,
        cer=0.125,
        token_edit_distance=0,
        bleu=100,
    )


def test_short_formulas_can_score_a_hundred() -> None:
    assert judge([("a+b", "a+b")]).bleu == pytest.approx(100)


def test_bleu_is_sacrebleus() -> None:
    pairs = [(r"\frac{a}{b}+c", r"\frac{a}{c}+c"), ("x_{i}^{2}=1", "x_{j}^{2}=1")]
    split = [[r"\frac { a } { b } + c", "x _ { i } ^ { 2 } = 1"]]
    split += [[r"\frac { a } { c } + c", "x _ { j } ^ { 2 } = 1"]]
    expected = BLEU(tokenize="none", force=True).corpus_score(split[0], [split[1]]).score
    assert 0 < expected < 100
    assert judge(pairs).bleu == pytest.approx(expected)


def test_empty_texts_behave() -> None:
    assert judge([("", "")]) == Metrics(
        rows=1, exact_match=1, exact_match_normalized=1, cer=0, token_edit_distance=0, bleu=0
    )
    empty_prediction = judge([("", "x^{2}")])
    assert empty_prediction.cer == 1
    assert empty_prediction.token_edit_distance == 1
    assert empty_prediction.bleu == 0
    empty_label = judge([("xyz", "")])
    assert empty_label.cer == 3
    assert empty_label.exact_match == 0


def test_only_what_was_asked_for_is_given() -> None:
    assert judge([("a", "a")], ("cer",)) == Metrics(rows=1, cer=0)
    assert judge([], NAMES) == Metrics(rows=0)


def test_an_unknown_metric_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="rouge"):
        judge([("a", "a")], ("rouge",))


# --- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "label"),
    [("NewYork 5", "New York 5"), ("5.00", "$5.00"), (r"a\,b", "ab"), ("it’s 5'", "it’s 5")],
)
def test_of_text_nothing_but_white_space_and_unicode_s_form_is_left_out(
    answer: str, label: str
) -> None:
    assert not metrics.score(answer, label, "text").exact_match_normalized


@pytest.mark.parametrize(
    ("answer", "label"),
    [("Cafe\u0301", "Café"), ("New\u00a0York\n5", " New York 5"), ("a  b", "a b")],
)
def test_white_space_and_unicode_s_form_make_no_other_text(answer: str, label: str) -> None:
    row = metrics.score(answer, label, "text")
    assert (row.exact_match, row.exact_match_normalized) == (False, True)


def test_words_are_what_white_space_parts() -> None:
    found = judge([("the cat sat", "the bat sat down")], ("wer", "bleu"), "text")
    assert found.wer == 2 / 4
    expected = BLEU(effective_order=True).corpus_score(["the cat sat"], [["the bat sat down"]])
    assert found.bleu == pytest.approx(expected.score)


@pytest.mark.timeout(60)  # far from what comparing each with each would take
def test_twenty_thousand_characters_are_quick() -> None:
    result = judge([("x" * 20_000, "y" * 20_000), (r"\alpha^2" * 2_500, "{" * 20_000)])
    assert result.cer == pytest.approx(1)
