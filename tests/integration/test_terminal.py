"""A run as a person sees it: a bar, Ctrl-C, what was kept, going on, a table at the end."""

import re
from pathlib import Path

from tests.jobs import read_json, small_run
from tests.terminal import job_on_terminal
from tests.unit.cli.test_help import colours

STEPS = 8


def test_ctrl_c_says_what_was_kept_and_the_command_that_it_names_goes_on(tmp_path: Path) -> None:
    output, cache = tmp_path / "out", tmp_path / "cache"
    command = small_run(str(output), "--set", f"train.max_steps={STEPS}", cache=cache)

    stopped = job_on_terminal(*command, interrupt_at=f"3/{STEPS}", hold=f"3/{STEPS}")
    assert stopped.code == 143
    assert f"3/{STEPS}" in stopped.text  # the bar leaves the count readable at 80 columns
    assert "SIGINT received: stopping after this step" in stopped.text
    assert "Traceback" not in stopped.text
    [checkpoint] = re.findall(r"kept: stages prep, baseline; checkpoint (\S+)", stopped.text)
    assert (Path(checkpoint) / "manifest.json").is_file()
    assert " ".join(command) in stopped.text
    kept = read_json(Path(checkpoint) / "manifest.json")["step"]

    going_on = job_on_terminal(*command, "--verbose", environ={"NO_COLOR": "1"})
    assert going_on.code == 0, going_on.text
    run = read_json(output / "run.json")
    assert run["stages"]["train"]["summary"]["resumed_from_step"] == kept
    assert not colours(going_on.text)
    plain = re.sub(r"\x1b\[[\d;]*m", "", going_on.text)
    assert (
        f"input train  uri builtin://formulas  digest {run['inputs']['train']['digest']}" in plain
    )
    assert f"is_now {run['stages']['train']['fingerprint']}" in plain
    assert "stored  file adapter/adapter_model.safetensors" in plain
    assert re.search(rf"loss +[\d.]+ +{run['metrics']['final']['loss']:.4g}", plain)


def test_ctrl_c_before_anything_is_complete_says_so(tmp_path: Path) -> None:
    many = ("--set", "data.train.limit=100000")  # which take longer than any key to arrive
    command = small_run(str(tmp_path / "out"), *many, cache=tmp_path / "cache")
    stopped = job_on_terminal(*command, interrupt_at="prep: started")
    assert stopped.code == 143
    assert "kept: nothing: no stage has completed" in stopped.text
    assert " ".join(command) in stopped.text
