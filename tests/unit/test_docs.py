"""What the documents name exists: links, targets, commands, keys, exit codes."""

import dataclasses
import re
from pathlib import Path

import pytest

from job import errors
from job.cli import app
from job.plan.accelerators import ACCELERATORS
from job.plan.facts import Plan
from job.spec import keys
from job.spec.load import load_spec
from tests.jobs import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", text(page)):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text(page), re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    known = {
        command.name or getattr(command.callback, "__name__", "")
        for command in app.registered_commands
    }
    assert set(re.findall(r"python -m job ([a-z]+)", text(page))) <= known


def test_the_spec_in_the_readme_is_valid() -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", text(ROOT / "README.md"), re.DOTALL)
    assert load_spec(example, "README.md", environ={}).spec.train.max_steps == 60


def test_the_table_of_exit_codes_is_that_of_the_errors() -> None:
    page = text(ROOT / "docs" / "02-results.md")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    codes = {kind.exit_code for kind in errors.JobError.__subclasses__()} | {errors.STOPPED}
    assert listed == {errors.OK, errors.JobError.exit_code} | codes


@pytest.mark.parametrize("key", ["model.family", "model.engine", "data.train.format"])
def test_the_support_matrix_has_every_choice(key: str) -> None:
    node = keys.at(tuple(key.split(".")))
    assert node is not None
    page = text(ROOT / "docs" / "support.md")
    assert [choice for choice in node["enum"] if f"`{choice}`" not in page] == []


def test_the_accelerators_of_a_plan_are_those_of_its_page() -> None:
    page = text(ROOT / "docs" / "plan.md")
    [listed] = re.findall(r"all that are known:\n(.*?)\.\n", page, re.DOTALL)
    assert re.findall(r"`([^`]+)`", listed) == list(ACCELERATORS)


def test_the_keys_of_a_plan_s_json_are_on_its_page() -> None:
    page = text(ROOT / "docs" / "plan.md").partition("## As JSON")[2]
    top = {field.name for field in dataclasses.fields(Plan)} - {"name", "output", "stages_unknown"}
    assert [name for name in sorted(top) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    known = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", text(file))
    }
    assert set(re.findall(r"`(test_\w+)`", text(page))) <= known
