"""Completion of the console script, by Tab pressed in real shells on a terminal."""

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
NAME = "finetune-job"
SCRIPT = Path(sys.executable).parent / NAME
# Answers the shells' questions as the console script does, and says what else it is called with.
JOB = f"""#!/bin/sh
[ -n "$_FINETUNE_JOB_COMPLETE" ] && exec '{SCRIPT}' "$@"
echo "ran {NAME} $*."
"""
LINES = {
    "vali": "validate",
    "run specs/im2l": "run specs/im2latex.yaml",
    "run my.yaml --se": "run my.yaml --set",
    "run my.yaml --set train.learning_ra": "run my.yaml --set train.learning_rate=",
    "manifest my.yaml --platform nv": "manifest my.yaml --platform nvidia",
    "reference train.learning_ra": "reference train.learning_rate",
}
# bash takes `a=b` apart, so that only the others complete what follows the `=`.
VALUES = {
    "run my.yaml --set train.optim=adamw_8": "run my.yaml --set train.optim=adamw_8bit",
}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not on this machine")
    return str(request.param)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a person who has nothing set up yet, with the script on the PATH."""
    assert SCRIPT.is_file(), f"{SCRIPT} is missing: make setup"
    script = tmp_path / "bin" / NAME
    script.parent.mkdir()
    script.write_text(JOB)
    script.chmod(0o755)
    return {
        "HOME": str(tmp_path),
        "ZDOTDIR": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / ".config"),
        "PATH": f"{script.parent}:{os.environ['PATH']}",
    }


def call_from(shell: str, home: dict[str, str], command: str) -> str:
    # What follows keeps the shell from being replaced by the command.
    done = subprocess.run(
        [shell, "-c", f"{command}; true"],
        env={**os.environ, **home},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [f"'{SCRIPT}'", f"'{sys.executable}' -m job"])
def test_tab_completes_commands_files_options_keys_and_values(
    shell: str, home: dict[str, str], command: str
) -> None:
    for _ in range(2):  # twice does no harm
        told = call_from(shell, home, f"{command} --install-completion")
        assert f"{shell} completion installed in {home['HOME']}" in told
    lines = {**LINES, **(VALUES if shell != "bash" else {})}
    loads = [f"{NAME} \t\n"] if shell == "zsh" else []  # there the first Tab only loads the script
    keys = iter([*loads, *(f"{NAME} {line}\t\n" for line in lines), "exit\n"])
    began = 0

    def type_in(text: str) -> str | None:
        nonlocal began
        if text.count(f"ran {NAME}") < began:
            return None
        began += 1
        return next(keys, None)

    shown = on_terminal(SHELLS[shell], environ=home, type_in=type_in, seconds=120)
    for line, ran in lines.items():
        assert f"ran {NAME} {ran}." in shown.text, f"{line}:\n{shown.text}"


@pytest.mark.parametrize("command", [f"'{SCRIPT}'", f"'{sys.executable}' -m job"])
def test_the_script_is_printed_for_the_shell_that_asks(
    shell: str, home: dict[str, str], command: str
) -> None:
    script = call_from(shell, home, f"{command} --show-completion")
    assert "_FINETUNE_JOB_COMPLETE=complete_" + shell in script
