"""What a command says once its run has succeeded."""

import sys
import time
from pathlib import Path

import pytest

from job import signals
from job.artifacts.records import PREDICTIONS
from job.cli.launch import asking, reported_once
from job.errors import SpecError, Stopped


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


@pytest.mark.parametrize("launcher_stops", [True, False])
def test_an_error_that_all_processes_of_a_machine_find_is_reported_by_the_first(
    monkeypatch: pytest.MonkeyPatch, launcher_stops: bool
) -> None:
    """If the launcher does not stop the others, the first one has not failed, so they report it."""
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if launcher_stops:
            raise Stopped("SIGTERM", "the job was asked to stop")

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(signals, "exit_now", sys.exit)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first of its machine
    with pytest.raises(SpecError), reported_once():
        raise SpecError("$.train", "is wrong")
    assert not waited

    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit if launcher_stops else SpecError) as ended, reported_once():
        raise SpecError("$.train", "is wrong")
    assert waited
    if launcher_stops:
        assert ended.value.args == (SpecError.exit_code,)
