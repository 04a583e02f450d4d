"""`job compare`: what it tells of runs beside each other, whatever state they are in."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from job import storage
from job.errors import InputError, UsageError
from job.evaluation.comparison import Comparison, as_json, compare
from job.evaluation.comparison.page import render, write
from job.evaluation.comparison.text import text
from job.evaluation.report import MAX_BYTES
from tests.conftest import S3
from tests.jobs import job
from tests.pages import Page
from tests.reports import HOSTILE
from tests.stored_runs import LABELS, STAGES, Made, store

VALIDATION = {
    step: {"eval_loss": 4 / step + (0.02 * step), "eval_cer": 1 / step} for step in range(4, 41, 4)
}
VALIDATED = {
    "metric": "eval_loss", "best_step": 16, "best": VALIDATION[16]["eval_loss"],
    "last_step": 40, "last": VALIDATION[40]["eval_loss"], "exported_step": 16,
    "stopped_early": False, "validations": 10, "rows": 20, "seconds": 3.0, "share": 0.02,
}  # fmt: skip
SMALLER = Made(
    sets=("lora.r=8", "train.learning_rate=0.0005", "runtime.cache_dir=/elsewhere"),
    wrong=(2, 3, 5),
    versions={"torch": "2.0", "source_revision": "abc"},
)

Store = Callable[[str, Made], str]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: `a`, `b` with other settings and answers, `c` on other rows."""
    place = tmp_path_factory.mktemp("runs")
    validated = Made(wrong=(1, 2), validation=VALIDATION, validated=VALIDATED)
    labels = [LABELS[2], "relabeled", *LABELS[4:], "new", "newer"]
    runs = {"a": validated, "b": SMALLER, "c": Made(labels=labels, first_row=2, wrong=(0,))}
    for name, made in runs.items():
        store(str(place / name), place / "work", made)
    return place


@pytest.fixture
def store_run(tmp_path: Path) -> Store:
    def stores(name: str, made: Made) -> str:
        store(str(tmp_path / name), tmp_path / "work", made)
        return str(tmp_path / name)

    return stores


def compared(place: Path, names: str) -> Comparison:
    return compare([str(place / name) for name in names])


def values(found: Sequence[object], key: str) -> tuple[object, ...]:
    [each] = [each for each in found if getattr(each, "key") == key]  # noqa: B009
    return tuple(getattr(each, "values"))  # noqa: B009


# --- what differs ------------------------------------------------------------------------------


def test_only_settings_that_differ_are_told_and_not_where_a_run_took_place(stored: Path) -> None:
    found = compared(stored, "ab").differences
    assert {each.key: each.values for each in found.settings} == {
        "lora.r": (16, 8),
        "train.learning_rate": (0.002, 0.0005),
    }
    assert values(found.versions, "torch")[1] == "2.0"
    assert values(found.versions, "source_revision")[1] == "abc"
    assert found.inputs == ()


def test_keys_that_an_older_version_did_not_have_are_told_only_if_they_were_set(
    stored: Path, store_run: Store
) -> None:
    older = Path(store_run("older", Made()))
    newer = store_run("newer", Made(sets=("lora.use_dora=true",)))
    lines = (older / "spec.resolved.yaml").read_text().splitlines()
    kept = [line for line in lines if "use_dora" not in line and "use_rslora" not in line]
    (older / "spec.resolved.yaml").write_text("\n".join(kept))
    later = Path(newer, "spec.resolved.yaml")
    later.write_text(later.read_text().replace("\nlora:", "\nlora:\n  of_a_later_version: null"))
    found = compare([str(older), newer]).differences
    assert [(each.key, each.values[1]) for each in found.settings] == [("lora.use_dora", True)]
    assert found.newer_keys == 2


def test_an_input_that_changed_under_its_name_is_told(stored: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(stored / "a", tmp_path / "changed"))
    record = json.loads((changed / "run.json").read_text())
    record["inputs"]["model"]["digest"] = "e" * 64
    (changed / "run.json").write_text(json.dumps(record))
    [model] = compare([str(stored / "a"), str(changed)]).differences.inputs
    assert model.values[1] == "builtin://ernie-vl-tiny (eeeeeeeeeeee)"


# --- metrics and answers -----------------------------------------------------------------------


def test_the_best_of_each_metric_is_marked_as_its_direction_has_it(stored: Path) -> None:
    lines = {line.key: line for line in compared(stored, "ab").metrics}
    assert [value.best for value in lines["loss"].values] == [True, False]
    assert [value.best for value in lines["exact_match"].values] == [True, False]
    loss = lines["loss"]
    assert loss.values[0].change(loss.kind) == ("−5.30", "better")
    assert loss.values[1].against(loss.values[0], loss.kind) == ("+0.100", "worse")


def test_equal_runs_have_no_best(stored: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(stored / "a", tmp_path / "copy")
    found = compare([str(stored / "a"), str(copy)])
    assert not any(value.best for line in found.metrics for value in line.values)
    assert found.answers.changed == ()
    assert "No setting differs." in text(found)


def test_rows_that_became_wrong_and_right_are_found_by_id_and_turn(stored: Path) -> None:
    found = compared(stored, "ab").answers
    assert found.right == (6, 5)
    assert found.lost == (None, (("rows.jsonl:3", 1), ("rows.jsonl:5", 1)))
    assert found.gained == (None, (("rows.jsonl:1", 1),))
    assert [each.lost for each in found.changed] == [True, True, False]


def test_other_rows_are_said_and_the_common_ones_compared(stored: Path) -> None:
    found = compared(stored, "abc")
    rows = found.held_out
    assert not rows.same
    assert rows.answers == (8, 8, 8)
    assert rows.digests[0] == rows.digests[1] != rows.digests[2]
    assert [row for row, _ in rows.common] == [f"rows.jsonl:{n}" for n in (2, 4, 5, 6, 7)]
    assert rows.other_labels == 1  # of row 3
    assert not any(value.best for line in found.metrics for value in line.values)
    [exact] = [line for line in found.common_metrics if line.key == "exact_match"]
    assert [value.after for value in exact.values] == [0.8, 0.6, 0.8]
    assert [value.best for value in exact.values] == [True, False, True]
    assert found.answers.right == (4, 3, 4)
    shown = text(found)
    assert "The held-out rows differ" in shown
    assert "5 in common; 1 more have other labels" in " ".join(shown.split())


def test_other_kinds_of_answers_are_not_called_changed(stored: Path, store_run: Store) -> None:
    other = store_run("other", Made(sets=("eval.answer=text", "eval.metrics=null")))
    found = compare([str(stored / "a"), other])
    assert found.answers.reference is None
    assert "Not compared: eval.answer differs" in text(found)


# --- runs that lack something ------------------------------------------------------------------


def test_a_run_that_failed_says_where_and_why_and_the_rest_is_compared(
    stored: Path, store_run: Store
) -> None:
    failed = store_run("failed", Made(stages=STAGES[:2], sets=("lora.r=4",)))
    found = compare([str(stored / "a"), failed])
    assert found.runs[1].lacks == (
        "a finished training, metrics after training, exported weights: "
        "it failed in train: memory: the GPU is full",
    )
    assert values(found.differences.settings, "lora.r") == (16, 4)
    assert "fewer than two runs have answers (A)" in text(found)
    assert values(found.figures, "steps") == (40, None)


def test_a_reinforcement_is_missing_only_where_the_spec_asks_for_one(
    stored: Path, store_run: Store
) -> None:
    asked = ("reinforce.rewards.name=exact_match",)
    stopped = store_run("stopped", Made(stages=STAGES[:3], sets=asked))
    found = compare([str(stored / "a"), stopped])
    assert not any("reinforcement" in each for each in found.runs[0].lacks)
    assert found.runs[1].lacks[0].startswith("a finished reinforcement, metrics after training, ")


def test_a_training_that_runs_is_drawn_up_to_its_newest_complete_checkpoint(
    stored: Path, store_run: Store
) -> None:
    running = Path(store_run("running", Made(stages=STAGES[:2])))
    for step in (2, 4, 6):
        folder = running / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        log = [{"step": n, "loss": 1.0, "epoch": 0.1} for n in range(1, step + 1)]
        state = {"log_history": log, "best_global_step": 2, "best_metric": 0.25}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        if step < 6:  # the last is being uploaded
            (folder / "manifest.json").write_text("{}")
    found = compare([str(stored / "a"), str(running)])
    run = found.runs[1]
    assert [each["step"] for each in run.history] == [1, 2, 3, 4]
    assert run.lacks[-1] == "curves after the checkpoint of step 4"
    assert values(found.figures, "best_step") == (16, 2)
    assert values(found.figures, "best_validation") == ("0.570 loss", "0.250 loss")


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        ("eval/predictions.jsonl", b"{}\n", "differs from its record"),
        ("train/history.jsonl", None, "is missing"),
        ("spec.resolved.yaml", None, "settings: spec.resolved.yaml is missing"),
        ("spec.resolved.yaml", b"a: [", "settings: "),
        ("spec.resolved.yaml", b"\xff\xfe", "settings: is not UTF-8"),
    ],
)
def test_a_file_that_is_lost_or_damaged_costs_its_own_part_alone(
    path: str, content: bytes | None, told: str, stored: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(stored / "b", tmp_path / "damaged"))
    (damaged / path).unlink()
    if content is not None:
        (damaged / path).write_bytes(content)
    found = compare([str(stored / "a"), str(damaged)])
    assert any(told in each for each in found.runs[1].lacks)
    assert values(found.figures, "train_rows") == (40, 40)
    assert text(found)


def test_a_record_of_an_older_version_is_read_as_far_as_it_goes(
    stored: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(stored / "b", tmp_path / "old"))
    record = json.loads((old / "run.json").read_text())
    for key in ("versions", "machine", "rows", "inputs", "metrics", "finished"):
        del record[key]
    (old / "run.json").write_text(json.dumps(record))
    found = compare([str(stored / "a"), str(old)])
    assert values(found.figures, "train_rows") == (40, None)
    assert text(found)
    assert render(found)


# --- what is refused ---------------------------------------------------------------------------


def test_fewer_than_two_runs_and_one_run_twice_are_usage(stored: Path, tmp_path: Path) -> None:
    one = str(stored / "a")
    with pytest.raises(UsageError, match="needs at least two runs"):
        compare([one])
    (tmp_path / "link").symlink_to(one)
    for other in (one, f"{one}/", f"file://{one}", str(tmp_path / "link")):
        with pytest.raises(UsageError, match="is named twice"):
            compare([one, other])


def test_everything_that_is_no_run_is_named_at_once(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "run.json").write_text('{"name": ')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("[]")
    inside = stored / "a" / "eval"
    record = tmp_path / "run.json"
    places = [tmp_path, tmp_path / "cut", tmp_path / "other", inside, stored / "b", record]
    with pytest.raises(InputError) as caught:
        compare(list(map(str, places)))
    said = str(caught.value)
    assert f"{tmp_path}: is not a run: it has no run.json" in said
    assert f"{tmp_path}/cut/run.json: is truncated or was changed" in said
    assert f"{tmp_path}/other/run.json: is not the record of a run" in said
    assert f"name the run itself: {stored / 'a'}" in said
    assert re.search(rf"{record}: is not a run\n +fix: name the run itself: {tmp_path}\n?$", said)
    assert str(stored / "b") not in said


def test_runs_in_a_bucket_are_compared_and_denied_access_is_an_input_error(
    s3: S3, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.upload_tree(stored / "b", s3.uri("run"))
    found = compare([str(stored / "a"), s3.uri("run")])
    assert len(found.answers.changed) == 3
    assert render(compare([s3.uri("run"), str(stored / "a")])).count("data:image/png") == 3
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-key")
    with pytest.raises(InputError, match="access denied"):
        compare([str(stored / "a"), s3.uri("run")])


# --- on a terminal -----------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits_its_terminal_and_leaves_no_run_out(columns: int, stored: Path) -> None:
    found = compare([*(str(stored / name) for name in "abc")])
    shown = text(found, columns)
    table = shown[shown.index("\n\n") :]
    assert max(map(len, table.splitlines())) <= columns
    for cell in ("0.0005", "0.700 (−5.30)", "62.5\u202f% (+62.5)"):
        assert cell in shown
    [head] = [line for line in table.splitlines() if line.startswith("Settings")][:1]
    assert head.split()[-1] == ("B" if columns == 60 else "C")


def test_hostile_text_and_secrets_stay_out_of_a_terminal_and_of_json(
    stored: Path, store_run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_TOKEN", "secret-word-123")
    other = store_run("other", Made(versions={"torch": "\x1b[2J\u202esecret-word-123"}))
    found = compare([str(stored / "a"), other])
    for shown in (text(found), as_json(found), render(found)):
        assert not set("\x1b\u202e") & set(shown)
        assert "secret-word-123" not in shown


# --- the page ----------------------------------------------------------------------------------


def test_the_page_shows_everything_on_its_own(stored: Path) -> None:
    found = compared(stored, "abc")
    html = render(found)
    page = Page(html)
    assert html == render(found)
    assert not page.all("script")
    [policy] = [each for each in page.all("meta") if each.get("http-equiv")]
    assert str(policy["content"]).startswith("default-src 'none'")
    ids = [str(each["id"]) for _, each in page.tags if "id" in each]
    assert len(ids) == len(set(ids))
    assert {str(each["href"])[1:] for each in page.all("a")} <= set(ids)
    assert all(cell.get("scope") for cell in page.all("th"))
    for words in ("lora.r", "Right in A, wrong in another run", "rows.jsonl:5", "B wrong",
                  "Metrics on held-out rows", "On the 5 answers in common"):  # fmt: skip
        assert words in page.text
    images = page.all("img")
    assert len(images) == len(found.answers.changed) == 1
    assert images[0]["alt"] == "Input of row rows.jsonl:5"


def test_all_curves_are_in_one_figure_with_a_text_in_their_place(stored: Path) -> None:
    page = Page(render(compared(stored, "ab")))
    loss, cer = [str(each["aria-label"]) for each in page.all("figure") if "role" in each]
    for words in ("A training: 6 at step 1", "B training: 6 at step 1", "A validation: 1.08 at",
                  "A best: 0.57 at step 16."):  # fmt: skip
        assert words in loss
    assert "B validation" not in loss
    assert cer.startswith("Character error rate, validation. A validation: 0.25 at step 4")


def test_hostile_answers_stay_text_on_the_page(stored: Path, store_run: Store) -> None:
    labels = [HOSTILE.replace("\ud83d", "") + str(number) for number in range(3)]
    first, second = (
        store_run(name, Made(labels=labels, wrong=wrong, said=HOSTILE))
        for name, wrong in (("first", (0,)), ("second", (1,)))
    )
    html = render(compare([first, second]))
    page = Page(html)
    assert not page.all("script")
    assert len(page.all("img")) == 2
    assert page.text.count("<script>alert(1)</script>") >= 4


def test_a_page_of_many_changes_stays_small_and_says_how_many_there_are(store_run: Store) -> None:
    labels = [f"{number}" + "x" * 600 for number in range(40)]
    first = store_run("first", Made(labels=labels))
    second = store_run("second", Made(labels=labels, wrong=range(30), said="z" * 600))
    html = render(compare([first, second]))
    assert len(html.encode()) <= MAX_BYTES
    assert "12 of 30, evenly spaced" in html
    assert html.count('alt="Input of row') == 12


def test_a_page_replaces_its_own_kind_and_nothing_else(stored: Path, tmp_path: Path) -> None:
    found, path = compared(stored, "ab"), tmp_path / "page.html"
    write(found, str(path))
    write(found, str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
    path.write_text("<h1>mine</h1>")
    with pytest.raises(InputError, match="is a file that compare did not write"):
        write(found, str(path))
    with pytest.raises(InputError, match="is inside the output of a run"):
        write(found, str(stored / "a" / "eval" / "page.html"))
    assert path.read_text() == "<h1>mine</h1>"
    write(found, f"memory://{tmp_path}/page.html")
    assert storage.is_file(f"memory://{tmp_path}/page.html")


# --- the command -------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_a_page(stored: Path, tmp_path: Path) -> None:
    runs, page = [str(stored / "a"), str(stored / "b")], tmp_path / "page.html"
    done = job("compare", *runs, "--html", str(page))
    assert done.code == 0, done.err
    assert "lora.r" in done.out
    assert f"comparison page written file={page}" in done.err
    assert "<h1>2 runs compared</h1>" in page.read_text()

    done = job("compare", *runs, "--no-html", "--format", "json")
    found = json.loads(done.out)
    assert found["settings"]["lora.r"] == {"A": 16, "B": 8}
    assert found["metrics"]["loss"]["best"] == ["A"]
    assert found["answers"]["gained"] == {"A": None, "B": [["rows.jsonl:1", 1]]}
    assert done.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["{a}"], 2, "needs at least two runs"),
        (["{a}", "{a}/"], 2, "is named twice"),
        (["{a}", "{b}", "--format", "yaml"], 2, "must be text or json"),
        (["{a}", "{b}", "--html", "x.html", "--no-html"], 2, "cannot be combined"),
        (["{a}", "{a}-missing"], 12, "is not a run"),
        (["{a}", "{b}", "--html", "{a}/run.json"], 12, "is a file that compare did not write"),
    ],
)
def test_the_command_ends_with_the_code_of_its_error(
    arguments: list[str], code: int, told: str, stored: Path
) -> None:
    filled = [each.format(a=stored / "a", b=stored / "b") for each in arguments]
    done = job("compare", *filled)
    assert done.code == code
    assert told in done.err
