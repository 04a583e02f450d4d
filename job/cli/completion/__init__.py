"""Completion of `python -m job` in bash, zsh and fish.

The shells complete by the command's name, which is python's, so the scripts beside this file step
in only behind `python -m job` and leave everything else to what completed it before. They ask the
interpreter that stands on the line, by a variable of the environment.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from job.errors import UsageError

VARIABLE = "_JOB_COMPLETE"
Shell = Literal["bash", "zsh", "fish"]


def prepare() -> None:
    """Where a shell asks what may come next: makes the answer possible."""
    if VARIABLE in os.environ:
        from typer.completion import completion_init

        completion_init()


def script(shell: Shell) -> str:
    """What a shell has to read."""
    return (Path(__file__).parent / f"job.{shell}").read_text(encoding="utf-8")


def install(shell: Shell) -> tuple[Path, Path]:
    """Writes the script where the shell finds it at its next start.

    Gives the script's place and the file that reads it; once is enough, twice does no harm.
    """
    if shell == "fish":
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        place = config / "fish" / "conf.d" / "finetune-job.fish"
        _write(place, script(shell))
        return place, place
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    place = data / "finetune-job" / f"completion.{shell}"
    start = Path.home() / ".bashrc"
    if shell == "zsh":
        start = Path(os.environ.get("ZDOTDIR") or Path.home()) / ".zshrc"
    _write(place, script(shell))
    line = f"source '{place}'"
    before = start.read_text(encoding="utf-8") if start.exists() else ""
    if line not in before.splitlines():
        ended = before if not before or before.endswith("\n") else f"{before}\n"
        _write(start, f"{ended}{line}\n")
    return place, start


def current_shell() -> Shell:
    """The shell that the job was called from. Raises UsageError where it is no known one."""
    import shellingham

    try:
        name = shellingham.detect_shell()[0]
    except shellingham.ShellDetectionFailure:
        name = Path(os.environ.get("SHELL", "")).name
    if name in get_args(Shell):
        return name
    raise UsageError(
        "completion",
        "is made for bash, zsh and fish",
        value=name or "no shell",
        fix="call it there",
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# --- what may stand at a parameter ----------------------------------------------------------


def spec_keys(incomplete: str) -> list[str]:
    """Keys of the spec, by dotted name."""
    from job.spec import keys

    return [key for key in keys.dotted_keys() if key.startswith(incomplete)]


def settings(incomplete: str) -> list[str]:
    """`KEY=` for each key; behind it, the values of one that takes a few only."""
    from job.spec import keys

    key, equals, _ = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in spec_keys(incomplete)]
    node = keys.at(tuple(key.split("."))) or {}
    values = node.get("enum") or (["true", "false"] if node.get("type") == "boolean" else [])
    return [text for value in values if (text := f"{key}={value}").startswith(incomplete)]


def one_of(*values: str) -> Callable[[str], list[str]]:
    """A few words."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]
