"""What a command says once its run has succeeded."""

import sys
from pathlib import Path

import pytest

from job.artifacts.records import PREDICTIONS
from job.cli.launch import asking


def test_the_model_is_asked_by_the_command_that_trained_it_about_its_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "job", "run", "s.yaml", "-o", "a b"])
    assert asking(str(tmp_path)) is None  # its answers are gone: the run has succeeded all the same
    answers = tmp_path / PREDICTIONS
    answers.parent.mkdir()
    answers.write_text('{"id": "rows.csv:3"}\n{"id": "rows.csv:9"}\n')
    assert asking(str(tmp_path)) == "python -m job infer s.yaml -o 'a b' --row rows.csv:3"
    monkeypatch.setattr(sys, "orig_argv", ["pytest"])
    assert asking(str(tmp_path)) is None
