"""The report of a real run: stored with checksums, regenerated when needed, never fatal."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from job.evaluation import report
from job.evaluation.report.formatting import amount
from job.pipeline import runner
from job.spec.load import LoadedSpec, load_spec
from tests.jobs import ROOT, job, read_json, small_run, sums


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished output, for a test to change."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def loaded(output: Path, cache: Path) -> LoadedSpec:
    """The spec of the small run, for a run in this process."""
    arguments = small_run(str(output), cache=cache)
    settings = [value for name, value in itertools.pairwise(arguments) if name == "--set"]
    text = (ROOT / "specs" / "latex.yaml").read_text(encoding="utf-8")
    return load_spec(text, "specs/latex.yaml", [*settings, f"output.uri={output}"])


def test_the_report_holds_the_figures_of_the_run(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "report.html" in sums(finished)
    metrics = read_json(finished / "run.json")["metrics"]
    for part in ("baseline", "final"):
        assert f">{amount(metrics[part]['loss'])}</td>" in html
    for line in (finished / "eval" / "predictions.jsonl").read_text().splitlines():
        assert json.loads(line)["id"] in html
    assert html.count("data:image/png;base64,") >= 6


def test_a_report_that_is_lost_is_made_again_byte_for_byte(output: Path, cache: Path) -> None:
    before = (output / "report.html").read_bytes()
    (output / "report.html").unlink()
    done = job(*small_run(str(output), cache=cache))
    assert done.code == 0, done.err
    assert done.err.count("complete, skipped") == 6
    assert (output / "report.html").read_bytes() == before


def test_a_report_is_made_again_with_the_evaluation_and_on_another_machine(
    finished: Path, output: Path, tmp_path: Path
) -> None:
    before = (output / "report.html").read_text(encoding="utf-8")
    arguments = small_run(str(output), cache=tmp_path / "other-machine")[1:]
    done = job("eval", *arguments, "--set", "eval.metrics=[cer]", "--set", "eval.baseline=false")
    assert done.code == 0, done.err
    assert "train: complete, skipped" in done.err
    after = (output / "report.html").read_text(encoding="utf-8")
    assert "Token edit distance" in before
    assert "Token edit distance" not in after
    assert "was not evaluated before training" in after

    done = job("compare", str(finished), str(output), "--no-html", "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert set(found["settings"]) == {"eval.metrics", "eval.baseline"}
    assert found["held_out"] == {**found["held_out"], "same": True, "common": 6}
    assert found["answers"]["lost"] == {"A": None, "B": []}
    assert found["runs"]["B"]["lacks"][0] == "metrics before training: eval.baseline is false"
    assert found["metrics"]["cer"]["best"] == []


def test_a_report_that_cannot_be_made_costs_no_result_and_is_told(
    output: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: report.RunResults) -> str:
        raise ValueError("a defect")

    (output / ".stages" / "report.json").write_text(
        (output / ".stages" / "report.json")
        .read_text()
        .replace('"fingerprint": "', '"fingerprint": "0')
    )
    with monkeypatch.context() as patch:
        patch.setattr(report, "render", fail)
        record = runner.run(loaded(output, cache))
    assert record.status == "succeeded"
    never_right = "the trained model answers no held-out row correctly (render_match is 0)"
    [failed, doubt] = record.warnings
    assert failed == "report: failed: ValueError: a defect"
    assert doubt == f"{never_right}: it may need more steps"
    assert "report: failed: ValueError: a defect" in capsys.readouterr().err
    assert read_json(output / "run.json")["warnings"] == record.warnings
    assert (output / "_SUCCESS").is_file()
    assert "merged/model.safetensors" in sums(output)
    # The old page told of other results.
    assert not (output / "report.html").exists()

    runner.run(loaded(output, cache))
    assert "report.html" in sums(output)
