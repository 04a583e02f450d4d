"""What `--help` teaches: examples of every command that run as they stand."""

import re
import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from job import __version__
from job.cli import help
from job.cli.app import app
from tests.jobs import ROOT, job
from tests.terminal import job_on_terminal

GROUP: Any = typer.main.get_command(app)


def commands(examples: str) -> list[list[str]]:
    """The words of each example, without what it is piped into."""
    lines = [
        line
        for line in examples.replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]
    return [shlex.split(line.partition(" | ")[0].partition(" > ")[0]) for line in lines]


def test_every_command_has_examples_and_a_panel() -> None:
    assert set(help.EXAMPLES) == set(GROUP.commands)
    assert sorted(name for names in help.PANELS.values() for name in names) == sorted(
        GROUP.commands
    )


@pytest.mark.parametrize("name", ["", *help.EXAMPLES])
def test_every_example_is_a_command_line_that_makes_sense(name: str) -> None:
    found = commands(help.EXAMPLES[name] if name else help.FIRST_STEPS)
    assert found
    for words in found:
        assert words[:3] == ["python", "-m", "job"]
        command, *rest = [word for word in words[3:] if word not in help.GLOBAL_OPTIONS]
        assert command == name or not name
        GROUP.commands[command].make_context(command, list(rest))
        for word in rest:
            assert not word.startswith("specs/") or (ROOT / word).is_file(), word


@pytest.mark.parametrize("command", ["", *help.EXAMPLES])
def test_no_help_shows_markup_and_each_shows_its_examples_once(command: str) -> None:
    words = [command, "--help"] if command else ["--help"]
    shown = CliRunner().invoke(app, words).output
    assert not re.findall(r"\[/?(?:dim|bold)?\]", shown)
    assert shown.count("Example") == 1


def test_plan_shows_its_examples_once_on_a_terminal_and_no_markup() -> None:
    shown = job_on_terminal("plan", "--help").text
    assert "[dim]" not in shown
    assert shown.count("Example") == 1


def test_no_example_is_wider_than_a_terminal_of_80_columns() -> None:
    for examples in (help.FIRST_STEPS, *help.EXAMPLES.values()):
        for line in examples.splitlines():
            assert len(line) <= 80 - 4, line  # its indent, and one column of margin at each side


@pytest.mark.parametrize("command", ["", "run", "manifest"])
def test_help_is_framed_and_coloured_on_a_terminal_and_plain_in_a_pipe(command: str) -> None:
    words = [command, "--help"] if command else ["--help"]
    shown, piped = job_on_terminal(*words), job(*words)
    assert shown.code == piped.code == 0
    assert "\x1b[1;36m" in shown.text
    assert "╭" in shown.text
    assert "\x1b" not in piped.out
    assert "╭" not in piped.out
    assert "Examples:" in shown.text
    assert "Examples:" in piped.out


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_dumb_terminal_gets_plain_text(environ: dict[str, str]) -> None:
    for arguments in (["--help"], ["run"], ["validate", "specs/latex.yaml"]):
        shown = job_on_terminal(*arguments, environ=environ)
        assert "\x1b" not in shown.text
        assert "╭" not in shown.text


def test_no_color_takes_the_colours_away() -> None:
    for arguments in (["--help"], ["validate", "specs/latex.yaml", "--set", "lora.r=0"]):
        assert colours(job_on_terminal(*arguments).text)
        assert not colours(job_on_terminal(*arguments, environ={"NO_COLOR": "1"}).text)


def colours(text: str) -> list[str]:
    """The sequences in a terminal's output that set a colour."""
    found = re.findall(r"\x1b\[([\d;]+)m", text)
    return [codes for codes in found if any(len(code) == 2 for code in codes.split(";"))]


@pytest.mark.parametrize("place", ["before", "behind"])
def test_options_of_all_commands_stand_before_or_behind_the_command(place: str) -> None:
    command = ["validate", "specs/latex.yaml"]

    def with_options(*options: str) -> str:
        return job(*([*options, *command] if place == "before" else [*command, *options])).err

    assert with_options("-q") == ""
    assert with_options("--log-format", "json").startswith("{")
    assert with_options("--log-format=json").startswith("{")


def test_what_follows_two_dashes_is_no_option() -> None:
    assert help.with_global_options_first(["run", "a", "-q", "--", "-v"]) == [
        "-q",
        "run",
        "a",
        "--",
        "-v",
    ]


def test_the_version_needs_no_command() -> None:
    done = job("--version")
    assert done.code == 0
    assert done.out.strip() == __version__
