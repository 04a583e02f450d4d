"""The shipped specs as they are, from beginning to end."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT, job, read_json, sums

PAPERS = ROOT.parent / "shared" / "data" / "im2latex"

pytestmark = pytest.mark.slow


@pytest.mark.slow(minutes=6)
@pytest.mark.timeout(1500)
def test_latex_runs_as_it_ships_and_halves_the_error_rate(tmp_path: Path) -> None:
    done = job("run", "specs/latex.yaml", environ={"OUTPUT": str(tmp_path)}, timeout=1400)
    assert done.code == 0, done.err
    metrics = read_json(tmp_path / "run.json")["metrics"]
    assert metrics["final"]["rows"] >= 200
    assert metrics["baseline"]["cer"] >= 0.3
    assert metrics["final"]["cer"] <= metrics["baseline"]["cer"] / 2
    assert sums(tmp_path)


@pytest.mark.slow(minutes=4)
@pytest.mark.timeout(1500)
def test_receipts_run_as_they_ship_and_become_json(tmp_path: Path) -> None:
    folder = str(tmp_path / "receipts")
    subprocess.run([sys.executable, "specs/receipts.py", folder], cwd=ROOT, check=True)
    environ = {"OUTPUT": str(tmp_path / "out"), "RECEIPTS": folder}
    done = job("run", "specs/receipts.yaml", environ=environ, timeout=1400)
    assert done.code == 0, done.err
    metrics = read_json(tmp_path / "out" / "run.json")["metrics"]
    assert metrics["baseline"]["valid_json"] < 0.1
    assert metrics["final"]["valid_json"] > 0.9
    assert metrics["final"]["field_f1"] > metrics["baseline"]["field_f1"] + 0.2
    assert "Fields" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


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
