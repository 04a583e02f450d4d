"""The shipped specs as they are, from beginning to end."""

from pathlib import Path

import pytest

from tests.jobs import ROOT, job, read_json, sums

PAPERS = ROOT.parent / "shared" / "data" / "im2latex"

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1500)
def test_latex_runs_as_it_ships_and_halves_the_error_rate(tmp_path: Path) -> None:
    done = job("run", "specs/latex.yaml", environ={"OUTPUT": str(tmp_path)}, timeout=1400)
    assert done.code == 0, done.err
    metrics = read_json(tmp_path / "run.json")["metrics"]
    assert metrics["final"]["rows"] >= 200
    assert metrics["baseline"]["cer"] >= 0.3
    assert metrics["final"]["cer"] <= metrics["baseline"]["cer"] / 2
    assert sums(tmp_path)


@pytest.mark.skipif(not PAPERS.exists(), reason="the formulas from papers are not at hand")
def test_im2latex_runs_on_formulas_from_papers(tmp_path: Path) -> None:
    environ = {"OUTPUT": str(tmp_path), "IM2LATEX": str(PAPERS), "MAX_STEPS": "20"}
    done = job("run", "specs/im2latex.yaml", environ=environ)
    assert done.code == 0, done.err
    run = read_json(tmp_path / "run.json")
    # Three of the 998 have an empty label.
    assert run["rows"]["train"] + run["rows"]["leaked"] == 995
    assert (run["rows"]["eval"], run["rows"]["rejected"]) == (100, 3)
    assert run["metrics"]["final"]["loss"] < run["metrics"]["baseline"]["loss"] - 0.5
    reasons = read_json(tmp_path / "data" / "stats.json")["rejected"]["reasons"]
    assert reasons == {"the answer is empty": 3}
