"""What the documents name exists: links, targets, commands, keys, exit codes."""

import re
from pathlib import Path

import pytest

from job import errors
from job.cli import app
from job.families import FAMILIES
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    known = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", text(file))
    }
    assert set(re.findall(r"`(test_\w+)`", text(page))) <= known


def test_every_cell_of_the_families_table_names_its_test_or_says_that_there_is_none() -> None:
    page = text(ROOT / "docs" / "10-model-families.md")
    head, *rows = re.findall(r"^\| (.+) \|$", page.partition("Each cell")[2], re.MULTILINE)
    assert re.findall(r"`(\w+)`", head) == [family.name for family in FAMILIES]
    wanted = {"load", "train", "LoRA targets", "merge", "vLLM, merged", "vLLM, adapter"}
    assert wanted <= {row.split(" | ")[0] for row in rows}
    for row in rows:
        for cell in row.split(" | ")[1:]:
            assert "`test_" in cell or cell.startswith(("not tested", "none: ")), cell
