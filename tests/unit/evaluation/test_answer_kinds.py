"""Kinds of answers: normal forms and scores."""

import json
from typing import get_args

import pytest

from job.errors import SpecError
from job.evaluation import answer_kinds, classes, fields
from job.evaluation.scoring import score_answers
from job.spec import keys
from job.spec.answer_kinds import ALL_METRICS, METRICS, Answer
from job.spec.load import load_spec

MINIMAL = """
version: 1
name: test
model: {model_name_or_path: "builtin://ernie-vl-tiny"}
data: {train: {uri: rows.jsonl}}
output: {uri: out}
"""


# --- the normal form ---------------------------------------------------------------------------


def test_every_kind_of_answer_has_its_normal_form_and_its_metrics() -> None:
    kinds = get_args(Answer)
    node = keys.at(("eval", "answer"))
    assert node is not None
    assert list(kinds) == list(node["enum"]) == list(METRICS)
    assert set(answer_kinds.NORMALIZERS) == set(kinds)


@pytest.mark.parametrize(
    ("kind", "one", "other", "same"),
    [
        ("text", "New York 5", "NewYork 5", False),
        ("text", "$5.00", "5.00", False),
        ("text", "New  York\n5 ", "New York 5", True),
        ("latex", "New York 5", "NewYork 5", True),
        ("latex", r"{a \over b}", r"\frac ab", True),
        ("json", '{"a": "12 34"}', '{"a": "1234"}', False),
        ("json", '{"a": 1, "b": [2.0]}', '{"b":[2],\n"a":1}', True),
        ("json", '{"a": true}', '{"a": 1}', False),
        ("json", '{"a": "1"}', '{"a": 1}', False),
        ("json", "no JSON  at all", "no JSON at all", True),
        ("label", " invoice\n", "invoice", True),
        ("label", "Invoice", "invoice", False),
    ],
)
def test_two_answers_are_the_same_as_their_kind_says(
    kind: Answer, one: str, other: str, same: bool
) -> None:
    form = answer_kinds.NORMALIZERS[kind]
    assert (form(one) == form(other)) is same


# --- metrics that fit --------------------------------------------------------------------------


def test_the_schema_lists_the_metrics_of_every_kind() -> None:
    node = keys.at(("eval", "metrics"))
    assert node is not None
    for kind, names in METRICS.items():
        assert f"{kind}: {', '.join(names)}." in node["description"]
    assert {*node["items"]["enum"], "loss"} == ALL_METRICS


def test_metrics_are_all_that_fit_where_none_is_named() -> None:
    found = load_spec(MINIMAL + "eval: {answer: json}", "spec", environ={}).spec.eval
    assert found.metrics is None
    assert found.measured == METRICS["json"]


@pytest.mark.parametrize(
    ("section", "message", "fix"),
    [
        (
            "{metrics: [cer, render_match]}",
            "does not apply to eval.answer: text, whose metrics are exact_match, "
            "exact_match_normalized, cer, wer, bleu",
            "use one of these, or set eval.answer: latex",
        ),
        (
            "{answer: label, metrics: [cer]}",
            "does not apply to eval.answer: label, whose metrics are accuracy, macro_f1",
            "use one of these, or set eval.answer: text or latex or json",
        ),
    ],
)
def test_a_metric_that_does_not_fit_is_an_error_that_says_what_does(
    section: str, message: str, fix: str
) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(f"{MINIMAL}eval: {section}", "spec", environ={})
    [problem] = caught.value.problems
    assert problem.field.partition("$.eval.metrics[")[1]
    assert (problem.message, problem.fix) == (message, fix)


# --- JSON --------------------------------------------------------------------------------------


def scored(prediction: str, label: str) -> tuple[int, int, int]:
    found, _, _ = fields.score(prediction, label)
    return found.fields_right, found.fields_answered, found.fields_expected


def test_fields_are_values_at_their_paths() -> None:
    value = {"shop": "A", "items": [{"name": "x", "price": 1}, {"name": "y", "price": 2}], "e": []}
    assert list(fields.fields_of(value)) == [
        ("shop", '"A"'), ("items[].name", '"x"'), ("items[].price", "1"),
        ("items[].name", '"y"'), ("items[].price", "2"), ("e", "[]"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "label", "expected"),
    [
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', (1, 2, 2)),
        ('{"a": 1}', '{"a": 1, "b": 3}', (1, 1, 2)),
        ('{"l": [2, 3]}', '{"l": [1, 2, 3]}', (2, 2, 3)),  # the first is lost, and no more
        ('{"l": [1, 1, 1]}', '{"l": [1]}', (1, 3, 1)),  # once is right, twice in excess
        ("not JSON", '{"a": 1}', (0, 0, 1)),
        ('{"a": 1', '{"a": 1}', (0, 0, 1)),
        ('```json\n{"a": 1}\n```', '{"a": 1}', (0, 0, 1)),
        ('{"a": NaN}', '{"a": null}', (0, 0, 1)),
        ("[" * 5_000, "[]", (0, 0, 1)),
        ("[" * 200 + "]" * 200, "[]", (0, 0, 1)),
        ("9" * 5_000, "9", (0, 0, 1)),
        ('{"a": "Cafe\u0301"}', '{"a": "Caf\u00e9"}', (1, 1, 1)),
    ],
)
def test_fields_that_are_right_are_counted(
    prediction: str, label: str, expected: tuple[int, int, int]
) -> None:
    assert scored(prediction, label) == expected


def test_a_label_that_is_no_json_is_left_out_and_counted() -> None:
    pairs = [('{"a": 1}', '{"a": 1}'), ("no", "a chat"), ("{}", '{"a": 1}')]
    predictions, labels = zip(*pairs, strict=True)
    found = score_answers("json", predictions, labels, METRICS["json"])
    assert found.counts == {"labels_not_json": 1}
    assert found.metrics["valid_json"] == 1.0
    assert found.metrics["exact_object"] == 0.5
    assert found.metrics["field_precision"] == 1 / 2  # `{}` is a value of its own
    assert found.metrics["field_recall"] == 1 / 2
    assert [line["path"] for line in found.details["fields"]] == ["a"]


# --- labels ------------------------------------------------------------------------------------


def test_classes_are_those_of_the_labels_and_weigh_the_same() -> None:
    labels = ["a"] * 8 + ["b"] * 2
    found = classes.score(["a"] * 8 + ["a", "cow"], labels)
    assert found.metrics == {"accuracy": 0.8, "macro_f1": pytest.approx((16 / 17 + 0) / 2)}
    assert found.confusion == ((8, 0, 0), (1, 0, 1))
    assert [(each.name, each.right, each.answered) for each in found.classes] == [
        ("a", 8, 9),
        ("b", 0, 0),
    ]


def test_the_confusion_matrix_stands_beside_the_metrics() -> None:
    found = score_answers("label", ["a ", "b"], ["a", "a"], ("accuracy",))
    assert found.metrics == {"accuracy": 0.5}
    assert found.details["confusion"] == ((1, 1),)
    assert [score["correct"] for score in found.scores] == [True, False]
    assert json.dumps(found.details)


@pytest.mark.parametrize("kind", get_args(Answer))
def test_no_answers_at_all_are_judged_without_metrics(kind: Answer) -> None:
    assert score_answers(kind, [], [], METRICS[kind]).metrics == {}
