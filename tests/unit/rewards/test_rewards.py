"""Each reward by name, on pairs made by hand."""

import json

import pytest

from job.evaluation import fields, metrics
from job.rewards.named import BY_NAME, rewards_of
from job.rewards.reward import Scored
from job.spec.answer_kinds import REWARDS
from job.spec.types import RewardSpec

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
HUGE = "x" * 20_000


def reward(name: str, answer: str, reference: str) -> float:
    [value] = BY_NAME[name]([Scored(answer=answer, reference=reference, prompt=None, row=0)])
    return value


def test_the_spec_names_the_rewards_that_exist() -> None:
    assert set(BY_NAME) == set(REWARDS)


@pytest.mark.parametrize("name", sorted(REWARDS))
@pytest.mark.parametrize(
    "answer",
    [
        "", " \n", "x", "{" * 500, "}" * 500, "\\", "$", "\ud800", "\0", COMPOSED, "漢字", HUGE,
        "null", '{"a": ' * 300, "[" * 5_000, r"\begin{array}{c}x", r"\left(", "^", "x_", "'" * 50,
    ],
    ids=lambda text: f"{text[:6]!a}x{len(text)}",
)  # fmt: skip
def test_any_answer_has_a_reward_between_0_and_1(name: str, answer: str) -> None:
    for reference in ("", "x", '{"a": 1}', "漢"):
        assert 0 <= reward(name, answer, reference) <= 1


@pytest.mark.parametrize(
    ("name", "answer", "reference", "value"),
    [
        ("exact_match", " x+1\n", "x+1", 1),
        ("exact_match", "x + 1", "x+1", 0),
        ("exact_match", "", "", 1),
        ("exact_match", "", "x", 0),
        ("exact_match", "x", "", 0),
        ("exact_match", "New  York", "New York", 0),
        ("exact_match", DECOMPOSED, COMPOSED, 0),
        ("character_accuracy", "abcd", "abcd", 1),
        ("character_accuracy", "abcx", "abcd", 0.75),
        ("character_accuracy", "", "abcd", 0),
        ("character_accuracy", "", "", 1),
        ("character_accuracy", "a", "", 0),
        ("character_accuracy", "abcdefghi", "abcd", 0),  # five edits: clipped
        ("character_accuracy", HUGE, "abcd", 0),
        ("render_match", r"{a \over b}", r"\frac{a}{b}", 1),
        ("render_match", r"a\,b", "ab", 1),
        ("render_match", "a", "b", 0),
        ("render_match", r"\frac{a}{b", r"\frac{a}{b}", 0),
        ("render_match", r"\nosuch", "x", 0),
        ("render_match", "", "x", 0),
        ("render_match", "", "", 1),
        # mathtext has no tables: the normal form decides.
        ("render_match", r"\begin{array}{c}x^2\end{array}", r"\begin{array}{c}x^{2}\end{array}", 1),
        ("render_match", r"\begin{array}{c}y\end{array}", r"\begin{array}{c}x\end{array}", 0),
        ("render_match", "x", r"\begin{array}{c}x\end{array}", 0),
        ("valid_latex", r"\frac{a}{b}", "x", 1),
        ("valid_latex", r"\left( x \right]", "x", 1),
        ("valid_latex", r"$x$", "x", 1),
        ("valid_latex", r"x'^2", "x", 1),
        ("valid_latex", r"x^{2}{}^{3}", "x", 1),
        ("valid_latex", r"x^\frac ab", "x", 1),
        ("valid_latex", r"\begin{array}{cc}a&b\\c&d\end{array}", "x", 1),
        ("valid_latex", r"\text{if } x\in\mathbb{R}", "x", 1),
        ("valid_latex", "", "x", 0),
        ("valid_latex", r"\,", "x", 0),
        ("valid_latex", "$x", "x", 0),
        ("valid_latex", "{x", "x", 0),
        ("valid_latex", "x}", "x", 0),
        ("valid_latex", r"\frac{a}", "x", 0),
        ("valid_latex", "x^", "x", 0),
        ("valid_latex", "x^2^3", "x", 0),
        ("valid_latex", "x_{a}_{b}", "x", 0),
        ("valid_latex", "x^2'", "x", 0),
        ("valid_latex", r"\left( x", "x", 0),
        ("valid_latex", r"x \right)", "x", 0),
        ("valid_latex", r"{\left( x}\right)", "x", 0),
        ("valid_latex", r"\begin{array}{c}x\end{matrix}", "x", 0),
        ("valid_latex", r"\begin{array}{c}x", "x", 0),
        ("valid_latex", r"\nosuchcommand x", "x", 0),
        ("valid_latex", r"\nosuchcommand x", r"\nosuchcommand", 1),  # the reference's is known
        ("valid_latex", "x\\", "x", 0),
        ("valid_latex", "%c", "x", 0),
        ("valid_latex", "x%c", "x", 1),
        ("valid_latex", "{x%}", "x", 0),
        ("valid_latex", "{x%}\n}", "x", 1),
        ("valid_latex", r"50\%", "x", 1),
        ("valid_latex", r"x\\%}", "x", 1),  # after a line end
        ("valid_latex", "#", "x", 0),
        ("valid_latex", "x#1", "x", 0),
        ("valid_latex", r"\#1", "x", 1),
        ("valid_latex", "a & b", "x", 0),
        ("valid_latex", r"a \& b", "x", 1),
        ("valid_latex", "a & b", "c & d", 1),  # a line of a table, as the reference is
        ("valid_latex", r"\begin{aligned}a&{b}\end{aligned}", "x", 1),
        ("valid_latex", r"\begin{aligned}{a&b}\end{aligned}", "x", 0),
        ("valid_latex", r"\begin{equation}a&b\end{equation}", "x", 0),
        ("valid_latex", r"\begin{array}{cc}\left(a&b\right)\end{array}", "x", 0),
        ("valid_latex", r"\matrix{a&b}", r"\matrix{c&d}", 1),
        ("valid_latex", r"\left(a\middle|b\right)", "x", 1),
        ("valid_latex", r"a\middle|b", "x", 0),
        ("valid_latex", r"\left(a{\middle|}b\right)", "x", 0),
        ("valid_latex", r"\left(a\right)\middle|b", "x", 0),
        ("valid_json", '{"a": [1, {"b": null}]}', "", 1),
        ("valid_json", '{"a": 1, "a": 2}', "", 1),
        ("valid_json", " 1 ", "", 1),
        ("valid_json", "", "{}", 0),
        ("valid_json", '{"a": 1', "{}", 0),
        ("valid_json", '```json\n{"a": 1}\n```', "{}", 0),
        ("valid_json", '{"a": NaN}', "{}", 0),
        ("valid_json", '{"a": 1} {"a": 1}', "{}", 0),
        ("field_f1", '{"b": 2, "a": {"c": [1]}}', '{"a":{"c":[1.0]},"b":2}', 1),
        ("field_f1", '{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.5),
        ("field_f1", '{"a": 1}', '{"a": 1, "b": 2}', 2 / 3),
        ("field_f1", '{"a": 9, "a": 1}', '{"a": 1}', 1),  # the last counts
        ("field_f1", f'{{"a": "{DECOMPOSED}"}}', f'{{"a": "{COMPOSED}"}}', 1),
        ("field_f1", "no JSON", '{"a": 1}', 0),
        ("field_f1", '{"a": 1}', "no JSON", 0),
        ("field_f1", "", "", 0),
        ("label_accuracy", " invoice\n", "invoice", 1),
        ("label_accuracy", "Invoice", "invoice", 0),
        ("label_accuracy", DECOMPOSED, COMPOSED, 1),
        ("label_accuracy", "an invoice", "invoice", 0),
        ("label_accuracy", "", "invoice", 0),
        ("length", "a" * 40, "b" * 40, 1),
        ("length", "a", "b" * 40, 1),
        ("length", "a" * 50, "b" * 40, 1),
        ("length", "a" * 70, "b" * 40, 0.5),
        ("length", "a" * 90, "b" * 40, 0),
        ("length", HUGE, "b" * 40, 0),
        ("length", "  ", "b", 0),
        ("length", "", "", 1),
        ("length", "aaaa", "", 0.5),
        ("length", "aa", "b", 1 - 0.75 / 8),
    ],
    ids=lambda value: f"{value[:24]!a}" if isinstance(value, str) else None,
)
def test_a_pair_has_its_reward(name: str, answer: str, reference: str, value: float) -> None:
    assert reward(name, answer, reference) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "reference"), [("a b", "ab"), ("", ""), ("abc", "abcd"), (f" {COMPOSED}", "cafe")]
)
def test_rewards_are_the_metrics_of_the_evaluation(answer: str, reference: str) -> None:
    score = metrics.score(answer, reference, "text")
    assert reward("exact_match", answer, reference) == score.exact_match
    assert reward("character_accuracy", answer, reference) == max(0, 1 - score.cer)
    pair = json.dumps({"a": answer, "n": 1}), json.dumps({"a": reference, "n": 1})
    assert reward("field_f1", *pair) == fields.score(*pair)[0].field_f1


def test_rewards_keep_the_order_of_the_spec_and_of_the_answers() -> None:
    found = rewards_of(
        [RewardSpec(name="length", weight=0.5), RewardSpec(name="exact_match", weight=1.0)],
        allow_code=False,
    )
    assert [(each.name, each.weight, each.digest) for each in found] == [
        ("length", 0.5, None),
        ("exact_match", 1.0, None),
    ]
    answers = [
        Scored(answer=text, reference="x", prompt="What?", row=row)
        for row, text in enumerate(["y", "x", "", "x" * 50])
    ]
    assert [each.score(answers) for each in found] == [[1, 1, 0, 0], [0, 1, 0, 0]]
    assert [each.score([]) for each in found] == [[], []]
