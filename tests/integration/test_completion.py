"""Completion, by Tab pressed in real shells on a terminal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT
from tests.terminal import on_terminal

SHELLS = {
    "bash": ("bash", "--noprofile", "-i"),
    "zsh": ("zsh", "-i"),
    "fish": ("fish", "-i"),
}
# Answers the shells' questions as python does, and says what else it is called with.
PYTHON = f"""#!/bin/sh
[ -n "$_JOB_COMPLETE" ] && exec '{sys.executable}' "$@"
echo "ran python $*."
"""
LINES = {
    "python -m job vali": "-m job validate",
    "python -m job run specs/im2l": "-m job run specs/im2latex.yaml",
    "python -m job run my.yaml --se": "-m job run my.yaml --set",
    "python -m job run my.yaml --set train.optim=adamw_8": (
        "-m job run my.yaml --set train.optim=adamw_8bit"
    ),
    "python -m job manifest my.yaml --platform nv": "-m job manifest my.yaml --platform nvidia",
    "python -m job reference train.learning_ra": "-m job reference train.learning_rate",
    "python -m jobs specs/im2l": "-m jobs specs/im2latex.yaml",
}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not on this machine")
    return str(request.param)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a person who has nothing set up yet."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    return {
        "HOME": str(tmp_path),
        "ZDOTDIR": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }


def call_from(shell: str, home: dict[str, str], option: str) -> str:
    # What follows keeps the shell from being replaced by the command.
    done = subprocess.run(
        [shell, "-c", f"'{sys.executable}' -m job {option}; true"],
        env={**os.environ, **home},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    return done.stdout


def test_tab_completes_commands_files_options_keys_and_values(
    shell: str, home: dict[str, str]
) -> None:
    for _ in range(2):  # twice does no harm
        assert "finetune-job" in call_from(shell, home, "--install-completion")
    keys = iter([*(f"{line}\t\n" for line in LINES), "exit\n"])
    began = 0

    def type_in(text: str) -> str | None:
        nonlocal began
        if text.count("ran python") < began:
            return None
        began += 1
        return next(keys, None)

    shown = on_terminal(SHELLS[shell], environ=home, type_in=type_in, seconds=60)
    for line, ran in LINES.items():
        assert any(f"ran python {ran}{end}" in shown.text for end in (".", "=.")), (
            f"{line}:\n{shown.text}"
        )


def test_the_script_is_printed_for_the_shell_that_asks(shell: str, home: dict[str, str]) -> None:
    script = call_from(shell, home, "--show-completion")
    assert script == (ROOT / "job" / "completion" / f"job.{shell}").read_text()
