"""The report's page: what it marks, escapes and omits, and its size limit."""

import json
import math
import random
import re
from dataclasses import replace

import pytest

from job.evaluation.report import MAX_BYTES, RunResults, facts, render
from job.evaluation.report.charts import charts
from job.evaluation.report.distributions import histograms
from job.evaluation.report.embedded_images import ImageEmbedder
from job.evaluation.report.figure import number, smooth, thin
from job.evaluation.report.generated_text import (
    MAX_CHARACTERS,
    MAX_UNLIKE_CHARACTERS,
    difference,
    visible,
)
from job.evaluation.report.headline import METRICS as HEADLINE
from job.evaluation.report.headline import headline
from job.evaluation.report.samples import choose
from job.evaluation.report.tables import table
from job.spec.answer_kinds import LOWER_IS_BETTER, Answer
from tests.pages import Page
from tests.reports import HOSTILE, METRICS, asked, of_task, png, prediction, results


def without(found: RunResults, name: str) -> RunResults:
    stages = {key: value for key, value in found.stages.items() if key != name}
    return replace(found, stages=stages, before=() if name == "baseline" else found.before)


# --- differences -------------------------------------------------------------------------------


def test_a_wrong_command_is_marked_as_a_whole() -> None:
    shown = difference(r"\frac{\beta}{b}", r"\frac{\alpha}{b}")
    assert [(span.mark, span.text) for span in shown.spans] == [
        ("same", r"\frac{"), ("missing", r"\alpha"), ("extra", r"\beta"), ("same", "}{b}"),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_the_spans_contain_both_the_answer_and_the_label(seed: int) -> None:
    rng = random.Random(seed)
    label = "".join(rng.choices([r"\alpha", r"\{", "x", " ", "12", "{", "}", "é"], k=40))
    answer = "".join(sign for sign in label if rng.random() > 0.2) + "z"
    spans = difference(answer, label).spans
    assert "".join(p.text for p in spans if p.mark != "missing") == answer.strip()
    if any(p.mark == "same" for p in spans):
        assert "".join(p.text for p in spans if p.mark != "extra") == label.strip()


def test_an_answer_unlike_its_label_is_one_extra_span() -> None:
    assert [span.mark for span in difference("}" * 50, r"\frac{a}{b}").spans] == ["extra"]
    assert difference("", "x").spans == ()
    shown = difference("}" * 500, "x")
    assert (len(shown.spans[0].text), shown.more) == (
        MAX_UNLIKE_CHARACTERS,
        500 - MAX_UNLIKE_CHARACTERS,
    )


def test_a_long_answer_is_cut_and_says_by_how_much() -> None:
    shown = difference("x" * 1000, "x" * 1000)
    assert (len(shown.spans[0].text), shown.more) == (MAX_CHARACTERS, 1000 - MAX_CHARACTERS)


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible("a\x00\u202eb\u200b\ud83d\n") == "a␀⟨U+202E⟩b⟨U+200B⟩\ufffd\n"


# --- figures -----------------------------------------------------------------------------------


def test_a_fall_is_better_for_errors_and_a_rise_for_matches() -> None:
    before = {"cer": 0.5, "exact_match": 0.5, "loss": 1.0}
    found = headline(before, {"cer": 0.2, "exact_match": 0.25, "loss": 1.0})
    assert [(m.key, m.change, m.verdict) for m in found] == [
        ("loss", "±0", "equal"),
        ("cer", "−0.300", "better"),
        ("exact_match", "−25.0\u202fpp", "worse"),
    ]


def test_rendering_says_what_was_not_compared() -> None:
    [metric] = headline(None, {k: v for k, v in METRICS.items() if "render" in k})
    assert metric.note == "1 skipped (label cannot be rendered), 2 failed (answer cannot)"


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_value_off_every_scale_stays_on_the_page(value: float) -> None:
    [metric] = headline({"loss": 2.0}, {"loss": value})
    assert 0 <= metric.after_position <= 1


def test_every_row_is_in_one_band() -> None:
    rows = [{"score": {"cer": value}} for value in (0, 0.05, 0.1, 0.2, 0.5, 1.0, 1.1, 30)]
    assert [band.after for band in facts.bands([], rows)] == [1, 2, 1, 1, 1, 2]


def test_changed_settings_are_marked() -> None:
    found = results()
    marked = facts.settings(found.settings, found.changed, ("train", "lora"))
    changed = {setting.path for setting in marked if setting.changed}
    assert "train.learning_rate" in changed
    assert "lora.lora_dropout" not in changed


# --- curves ------------------------------------------------------------------------------------


def test_curves_leave_out_what_is_no_number_and_say_their_ends() -> None:
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}]
    [chart] = charts(history)
    assert chart.description == (
        "Loss: 3 at step 1, 1 at step 3; lowest 1 at step 3, highest 3 at step 1."
    )
    assert charts([]) == ()


def test_each_group_of_weights_with_a_learning_rate_of_its_own_has_a_curve() -> None:
    history = [
        {
            "step": n,
            "learning_rate": 1.0 / n,
            "learning_rates": {"base": 1.0 / n, "lora_B": 4.0 / n},
        }
        for n in (1, 2, 3)
    ]
    assert [each.title for each in charts(history)] == ["Learning rate", "Learning rate of lora B"]


def test_curves_are_the_same_bytes_each_time_and_take_the_pages_colours() -> None:
    history = results().history
    assert charts(history) == charts(history)
    svg = charts(history)[0].svg
    assert "var(--accent)" in svg
    assert not re.search(r"#[0-9a-f]{6}|<style|<metadata|font-family", svg)


def test_long_curves_are_thinned_without_moving_their_mean() -> None:
    curve = [(float(i), float(i % 7)) for i in range(10_000)]
    short = thin(curve)
    assert len(short) == 300
    assert sum(y for _, y in short) / 300 == pytest.approx(3, abs=0.05)
    assert smooth([(0, 5.0)] * 50)[0][1] == pytest.approx(5)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (2e-4, "2e-4"), (12_500, "12.5k")])
def test_numbers_fit_an_axis(value: float, text: str) -> None:
    assert number(value) == text


VALIDATED = {
    "metric": "eval_cer", "greater_is_better": False, "best_step": 20, "best": 0.25,
    "last_step": 30, "last": 0.5, "exported_step": 20, "stopped_early": True, "validations": 3,
    "rows": 12, "share": 0.015,
}  # fmt: skip


def validated(**changes: object) -> RunResults:
    """The results of a training that was validated after steps 10, 20 and 30."""
    found = results()
    measured = {10: 0.75, 20: 0.25, 30: 0.5}
    lines = [
        {"step": step, "epoch": 0.1, "eval_loss": cer + 1, "eval_cer": cer, "eval_seconds": 0.5}
        for step, cer in measured.items()
    ]
    train = replace(
        found.stages["train"],
        summary={
            **found.stages["train"].summary, "steps": 30, "validation": {**VALIDATED, **changes}
        },
    )  # fmt: skip
    history = [*[line for line in found.history if line["step"] <= 30], *lines]
    return replace(found, stages={**found.stages, "train": train}, history=history)


def test_validation_is_drawn_beside_training_with_the_best_step_and_the_stop() -> None:
    page = Page(render(validated()))
    loss, cer, *_ = [str(each["aria-label"]) for each in page.all("figure") if "role" in each]
    assert "training: 6 at step 1" in loss
    assert "validation: 1.75 at step 10, 1.5 at step 30; lowest 1.25 at step 20" in loss
    assert loss.endswith("the best step: 1.25 at step 20. stopped early: step 30.")
    assert cer.startswith("Character error rate, validation: 0.75 at step 10")
    assert cer.endswith("best: 0.25 at step 20. stopped early: step 30.")
    keys = {each.get("class") for each in page.all("i")}
    assert {"key line", "key dots", "key ring", "key stop"} <= keys


def test_the_page_names_the_best_and_the_last_validation_and_whose_results_these_are() -> None:
    text = " ".join(Page(render(validated())).text.split())
    assert "Best validation character error ratestep 200.250" in text
    assert "Last validation character error ratestep 300.500" in text
    assert "Validated 3 times on 12 rows of their own, which took 1.5% of the training time" in text
    assert "Training stopped early at step 30: no improvement." in text
    assert "The results are those of the best step, 20." in text
    reinforced = {
        "learned": True, "first_reward": 0.1, "last_reward": 0.2, "answers_a_step": 8,
        "rows_a_step": 2, "steps": 6, "equal_groups": 0.5, "generated_tokens_per_second": 9.0,
        "generating_share": 0.5, "peak_memory_bytes": 1,
        "validation": {**VALIDATED, "best_step": 4, "exported_step": 4, "validations": 2},
    }  # fmt: skip
    found = validated()
    stage = replace(found.stages["train"], name="reinforce", summary=reinforced)
    both = replace(found, stages={**found.stages, "reinforce": stage})
    text = " ".join(Page(render(both)).text.split())
    assert "Reinforcement starts from the best step, 20." in text
    assert "Validated 2 times. The results are those of the best step, 4." in text
    assert "results are those of the best step, 20" not in text
    last = Page(render(validated(exported_step=30, stopped_early=False))).text
    assert "The results are those of the last step, 30." in last
    assert "stopped early" not in last


def test_a_run_without_validation_looks_as_before() -> None:
    page = Page(render(results()))
    assert not re.search("Validated|Best validation|Validation rows", page.text)
    assert not [each for each in page.all("i") if "key" in str(each.get("class"))]


@pytest.mark.parametrize("value", [None, math.nan])
def test_validations_that_were_never_finite_break_no_page(value: float | None) -> None:
    found = validated(best=None, best_step=None, last=None)
    history = [{**line, "eval_loss": value, "eval_cer": value} for line in found.history]
    html = render(replace(found, history=history))
    assert "Best validation" not in html


def test_a_metric_is_better_in_the_direction_that_selects_the_best_step() -> None:
    assert {key for key, kind in HEADLINE.items() if not kind.higher_is_better} == LOWER_IS_BETTER


# --- rows --------------------------------------------------------------------------------------


def test_samples_are_spread_and_no_worst_row_is_among_them() -> None:
    found = [{"score": {"cer": 5.0 if i >= 90 else 0.1}} for i in range(100)]
    evenly, worst = choose(found, 16, 8)
    assert (len(evenly), worst) == (16, [90, 91, 92, 93, 94, 95, 96, 97])
    assert not set(evenly) & set(worst)
    assert max(evenly) - min(evenly) > 70


def test_right_rows_are_never_the_worst() -> None:
    assert choose([{"score": {"cer": 0.0}}] * 9, 16, 8) == (list(range(9)), [])
    assert choose([], 16, 8) == ([], [])


def test_images_stop_at_their_budget() -> None:
    from PIL import Image

    embedder = ImageEmbedder(budget=4_000)
    noise = [Image.frombytes("L", (50, 50), random.Random(i).randbytes(2500)) for i in range(3)]
    assert [embedder.embed(image) is not None for image in noise] == [True, False, False]
    assert embedder.omitted == 2


# --- the page ----------------------------------------------------------------------------------


def test_a_page_is_well_formed_and_the_same_each_time() -> None:
    html = render(results())
    assert html == render(results())
    page = Page(html)
    ids = [str(a["id"]) for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) > 8
    links = {str(a["href"])[1:] for a in page.all("a")}
    assert links <= set(ids)
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") for cell in page.all("th"))
    for word in ("Character error rate", "Exact match, normalized", "Render match", "rank 16"):
        assert word in page.text


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    page = Page(render(results()))
    assert not page.all("script")
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert str(value).startswith(("data:", "#"))
    [policy] = [m for m in page.all("meta") if m.get("http-equiv")]
    assert str(policy["content"]).startswith("default-src 'none'")


def test_hostile_text_stays_text_wherever_it_stands() -> None:
    found = replace(
        results([prediction(HOSTILE, HOSTILE, HOSTILE + "x")]),
        name=HOSTILE,
        inputs={"model": {"uri": HOSTILE, "digest": HOSTILE}},
        versions={HOSTILE: HOSTILE},
        rejects=[{"id": HOSTILE, "reason": HOSTILE}],
    )
    html = render(found)
    page = Page(html)
    assert not page.all("script")
    assert not page.all("img")
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert not set("\u202e\x00\ud83d") & set(html)
    assert html.encode()


def test_a_page_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_TOKEN", "pass<word>123")
    inputs = {"model": {"uri": "s3://pass<word>123/x", "digest": "d"}}
    html = render(replace(results(), inputs=inputs))
    assert "word&gt;123" not in html
    assert "${DATA_TOKEN}" in html


def test_how_rows_spread_is_drawn_from_the_figures_of_prep_and_training() -> None:
    page = render(results())
    for title in ("Tokens per row", "Characters per answer", "Pixels per image"):
        assert page.count(title) == 1
    assert "1 of 40 rows (2.50%) exceed train.max_length (512)" in page
    tokens, letters, _ = histograms(results().statistics, results().lengths)
    assert [(bar.name, bar.count) for bar in tokens.bars] == [
        ("32 – 63", 25), ("64 – 127", 8), ("128 – 255", 6), ("256 – 511", 0),
        ("512 – 1,023", 0), ("1,024 – 2,047", 0), ("2,048 – 4,095", 1),
    ]  # fmt: skip
    assert [bar.share for bar in letters.bars] == [0.6, 1.0, 0.35, 0, 0.05]
    assert histograms(None, None) == ()
    assert histograms({"train": {"image_pixels": {"histogram": {}}}}, None) == ()


def test_without_a_baseline_the_page_says_so_and_compares_nothing() -> None:
    page = Page(render(without(results(), "baseline")))
    assert "was not evaluated before training" in page.text
    assert "Change" not in page.text
    assert "6.00" not in page.text.split("Training")[0]


def test_a_metric_that_was_not_asked_for_is_not_on_the_page() -> None:
    found = results()
    stages = dict(found.stages)
    stages["eval"] = replace(
        stages["eval"],
        summary={"metrics": {"loss": 1.0, "bleu": 3.0}, "generated_tokens_per_second": 1.0},
    )
    page = Page(render(replace(found, stages=stages)))
    assert "BLEU" in page.text
    assert "Render match" not in page.text


def test_full_fine_tuning_is_called_so() -> None:
    found = results()
    settings = json.loads(json.dumps(found.settings))
    settings["lora"]["method"] = "full"
    assert "Full fine-tuning of" in Page(render(replace(found, settings=settings))).text


def test_images_stand_beside_the_rendered_answer() -> None:
    found = results()
    page = Page(render(replace(found, rows=asked(found, png()))))
    alts = [str(image["alt"]) for image in page.all("img")]
    assert alts[:2] == ["Input of row rows.jsonl:0", "Rendered answer of row rows.jsonl:0"]
    assert len(alts) == 6


def test_ten_thousand_rows_of_long_text_and_noise_stay_under_two_megabytes() -> None:
    rng = random.Random(1)
    signs = ["\u202e", "<", "&", '"', "\\alpha", "x"]
    after = []
    for i in range(10_000):
        label = "".join(rng.choices(signs, k=900)) if i % 100 == 0 else "x"
        answer = "".join(sign for sign in label if rng.random() > 0.4)
        after.append(prediction(f"rows.jsonl:{i}", label, answer))
    rejects = [{"id": "r" * 9_000, "reason": "<" * 9_000}] * 10_000
    found = replace(results(after), rejects=rejects)
    html = render(replace(found, rows=asked(found, png(size=(760, 480)))))
    assert len(html.encode()) < MAX_BYTES
    assert "of 10,000 rows" in html
    assert "images are omitted" in html


# --- tasks that are no formulas ----------------------------------------------------------------


def test_json_answers_are_told_by_their_fields() -> None:
    page = Page(render(of_task("json")))
    for words in ("Valid JSON", "Exact object", "Field F1", "Fields", "exact object",
                  "1 of 2 fields correct", "Labels that are not JSON"):  # fmt: skip
        assert words in page.text
    assert "cannot be rendered" not in page.text
    assert "Distribution of character error rates" not in page.text


def test_labels_are_told_by_their_classes_and_what_they_were_taken_for() -> None:
    page = Page(render(of_task("label")))
    for words in ("Accuracy", "Macro F1", "Classes", "Confusion matrix after training", "wrong"):
        assert words in page.text
    assert "other" in page.text
    assert "Character error rate" not in page.text
    for row in ("invoice4000", "letter0300", "receipt1001"):
        assert row in page.text


def test_many_classes_are_listed_by_what_is_confused_most() -> None:
    before = [{"id": str(n), "label": f"c{n % 20:02}", "prediction": "c00"} for n in range(60)]
    found = table("label", before, before)
    assert found is not None
    assert found.confusion is None
    assert (found.confused[0].answer, found.confused[0].count) == ("c00", 3)
    assert len(found.confused) == 19


def test_a_conversation_is_shown_with_its_history_and_all_its_images() -> None:
    page = Page(render(of_task("text", conversations=True)))
    alts = [str(image["alt"]) for image in page.all("img")]
    assert "Image 2 of row rows.jsonl:0" in alts
    for words in ("4 answers in 2 held-out rows", "Answer in one line.", "answer 2", "cut short",
                  "[image 1] [image 2] What is it?", "Cut short"):  # fmt: skip
        assert words in page.text
    assert "cannot be rendered" not in page.text


def test_one_question_for_all_is_said_once() -> None:
    page = Page(render(of_task("text")))
    assert page.text.count("What is it?") == 1


def test_a_row_of_text_alone_has_no_empty_pane() -> None:
    found = of_task("text")
    assert "no image" not in render(replace(found, rows=None))


@pytest.mark.parametrize("kind", ["json", "label", "text"])
def test_hostile_answers_of_every_task_stay_text(kind: Answer) -> None:
    found = of_task(kind)
    bad = [{**row, "id": HOSTILE, "label": HOSTILE, "prediction": HOSTILE + str(n),
            "asked": [{"role": "user", "content": [{"type": "text", "text": HOSTILE * (n + 1)}]}]}
           for n, row in enumerate(found.after)]  # fmt: skip
    html = render(replace(found, after=bad))
    page = Page(html)
    assert not page.all("script")
    assert not set("\u202e\x00\ud83d") & set(html)
