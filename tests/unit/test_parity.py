"""Parity: what differs by more than rounding is told by a line, and nothing else is."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import JobError
from job.parity import compare, measure
from tests.jobs import ROOT, job

COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "parity-cpu.json").read_text())
WAY = {"way": "captured passes", "taken": True, "reason": "", "milliseconds": 1.0, "off": 0.0}


def on_a_gpu() -> dict[str, Any]:
    found = copy.deepcopy(COMMITTED)
    found |= {"name": "parity-rocm", "kind": "rocm", "device": "AMD Instinct MI300X", "ways": [WAY]}
    found["runs"]["bfloat16"] = copy.deepcopy(found["runs"]["float32"])
    return found


def test_a_record_differs_neither_by_rounding_nor_in_bytes_on_another_device() -> None:
    assert list(compare.differences(COMMITTED, COMMITTED)) == []
    found = on_a_gpu()
    run = found["runs"]["float32"]
    run["losses"] = [loss * (1 + compare.LOSS["float32"] / 2) for loss in run["losses"]]
    run["exported"] = dict.fromkeys(run["exported"], "other bytes")
    assert list(compare.differences(found, COMMITTED)) == []
    assert list(compare.faults(found)) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda r: r["runs"]["float32"]["losses"].__setitem__(2, 9.0),
            "float32: the loss of step 3 is 9, expected",
        ),
        (
            lambda r: r["runs"]["float32"]["evaluated"].update(final=float("nan")),
            "float32: the loss of the evaluation final is nan, expected",
        ),
        (lambda r: r["runs"]["float32"]["losses"].pop(), "float32: 7 steps, expected 8"),
        (lambda r: r["logits"][0].__setitem__(0, 50.0), "logits differ by"),
        (lambda r: r["logits"].pop(), "logits differ by inf"),
        (
            lambda r: r["runs"]["float32"]["exported"].update({"merged/model.safetensors": "x"}),
            "float32: other bytes in merged/model.safetensors, with the same device and versions",
        ),
        (lambda r: r["runs"]["float32"]["exported"].clear(), "float32: exports [], expected"),
    ],
)
def test_each_difference_is_one_line_that_names_what_it_was_compared_with(
    change: Callable[[dict[str, Any]], None], line: str
) -> None:
    found = copy.deepcopy(COMMITTED)
    change(found)
    [difference] = compare.differences(found, COMMITTED)
    assert difference.startswith(line)
    assert difference.endswith(f"compared with parity-cpu ({COMMITTED['device']})")


def test_bytes_are_not_compared_on_a_gpu_and_a_loss_that_is_not_finite_is_a_fault() -> None:
    before, found = on_a_gpu(), on_a_gpu()
    run = found["runs"]["bfloat16"]
    run["exported"] = dict.fromkeys(run["exported"], "other bytes")
    assert list(compare.differences(found, before)) == []
    run["losses"][0] = None
    assert list(compare.faults(found)) == ["bfloat16: the loss of step 1 is not finite"]
    [difference] = compare.differences(found, before)
    assert difference.startswith("bfloat16: the loss of step 1 is not finite, expected")


def test_a_tiny_job_that_hangs_is_ended_with_the_command_to_run_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "JOB_SECONDS", 0.01)
    with pytest.raises(JobError, match="was not done after"):
        measure._run("float32", measure.EXACT, tmp_path / "out", tmp_path / "cache")


def test_a_gpu_that_became_slower_or_left_a_way_is_told_and_another_gpu_is_not() -> None:
    before, found = on_a_gpu(), on_a_gpu()
    found["runs"]["bfloat16"]["tokens_per_second"] /= 3
    found["ways"] = [WAY | {"milliseconds": 2.5}]
    assert len(list(compare.differences(found, before))) == 2
    found["ways"] = [WAY | {"taken": False, "reason": "hipErrorUnknown", "milliseconds": None}]
    lines = list(compare.differences(found, before))
    assert any(
        "captured passes was left (hipErrorUnknown), and taken before" in each for each in lines
    )
    assert list(compare.differences(found | {"device": "AMD Instinct MI250X"}, before)) == []


def test_tests_that_failed_are_faults_by_name(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure/></testcase>'
        '<testcase classname="b" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    counted = measure.counts(report)
    assert counted == {"passed": 1, "failed": ["a::two"], "skipped": 1}
    assert list(compare.faults(on_a_gpu() | {"gpu_tests": counted})) == ["the test a::two failed"]


def test_what_a_cpu_ran_is_no_way_of_a_gpu() -> None:
    assert COMMITTED["ran"] == ["train", "eval", "export"]


def parity(*arguments: str, code: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "job", "parity", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


def test_an_installed_package_says_that_it_needs_a_checkout_or_an_image(tmp_path: Path) -> None:
    left = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(ROOT / "job", tmp_path / "job", ignore=left)
    done = parity(code=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "needs specs/latex.yaml, which an installed package does not have" in done.stderr
    assert "in a checkout of the repository (make parity), or in an image" in done.stderr


@pytest.mark.parametrize("option", ["--against", "--tests"])
def test_a_folder_without_records_or_tests_is_refused_before_the_job_runs(
    option: str, tmp_path: Path
) -> None:
    done = parity(option, str(tmp_path / "none"))
    assert done.returncode == 2, done.stderr
    assert option in done.stderr


@pytest.mark.parametrize("command", ["parity", "eval"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    command: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    more = () if command == "parity" else ("specs/latex.yaml", "--adapter", str(tmp_path))
    done = job(command, *more, "--to", str(tmp_path / "file" / "x"), timeout=60)
    assert done.code == 12, done.err
    assert str(tmp_path / "file") in done.err


@pytest.mark.slow(minutes=2)
def test_this_machine_computes_what_the_committed_results_say(tmp_path: Path) -> None:
    record = tmp_path / "parity.json"
    done = job("parity", "--to", str(record), "--cache-dir", str(tmp_path / "cache"), timeout=900)
    assert done.code == 0, done.err
    assert json.loads(record.read_text())["runs"]["float32"]["losses"]
    changed = copy.deepcopy(COMMITTED)
    changed["runs"]["float32"]["losses"][0] = 1.0
    found = json.loads(record.read_text())
    assert len(list(compare.differences(found, changed))) == 1
