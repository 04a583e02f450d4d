"""What the docs name exists: links, targets, commands, options, keys, files, messages."""

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
import yaml

from job import errors
from job.cli import help
from job.cli.app import app
from job.families import FAMILIES
from job.planning.accelerators import ACCELERATORS
from job.planning.facts import Plan
from job.spec import keys
from job.spec.load import load_spec
from tests.jobs import ROOT
from tests.unit.project.test_rooms import RANK, stated

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(DOCS / "zh").glob("*.md")])
IMAGES = sorted((DOCS / "images").rglob("*.svg"))
GROUP: Any = typer.main.get_command(app)
SECTIONS = {"model", "data", "lora", "train", "eval", "export", "output", "runtime"}
FOLDERS = ("job", "specs", "containers", "k8s", "tests", "docs", "requirements", "benchmarks")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """A page's fenced code blocks in the given languages."""
    fenced = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)
    return [code for language, code in fenced if language in languages]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    prose = re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)", text(page)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.MULTILINE))
    named = re.findall(r"^\s*make ([a-z-]+)|`make ([a-z-]+)", text(page), re.MULTILINE)
    assert {target for pair in named for target in pair if target} <= targets


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each `python -m job` on a page, in code blocks and in prose."""
    lines = [
        line for code in blocks(page, "bash", "console") for line in _joined(code).splitlines()
    ]
    lines += re.findall(r"`([^`\n]*python -m job[^`\n]*)`", text(page))
    for line in lines:
        for command in re.split(r"\s(?:&&|[|;>&#])(?:\s|$)", line):
            if (arguments := command.partition("python -m job ")[2]) and "…" not in arguments:
                yield shlex.split(arguments)


def _joined(code: str) -> str:
    return re.sub(r"\\\n\s*", " ", code)


@every_page
def test_commands_and_their_options_exist(page: Path) -> None:
    of_group = {option for parameter in GROUP.params for option in parameter.opts}
    of_group |= {"-h", "--help"}
    for words in commands(page):
        options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        [command, *_] = [*(word for word in words if not word.startswith("-")), None]
        if command is None or not re.fullmatch("[a-z]+", command):
            assert options <= of_group or command is not None, words
            continue
        assert command in GROUP.commands, words
        known = {o for parameter in GROUP.commands[command].params for o in parameter.opts}
        assert options <= known | set(help.GLOBAL_OPTIONS) | {"-h", "--help"}, words


@every_page
def test_specs_are_valid_whole_and_in_parts(page: Path) -> None:
    least = {
        "version": 1,
        "name": "part",
        "model": {"model_name_or_path": "models/x"},
        "data": {"train": {"uri": "data/train.jsonl"}},
        "output": {"uri": "outputs/part"},
    }
    for code in blocks(page, "yaml"):
        spec: Any = next(yaml.safe_load_all(code), {})  # a block of comments only has none
        if "version" in spec:
            load_spec(code, name_of(page), environ={})
        elif set(spec) <= SECTIONS:
            load_spec(yaml.safe_dump({**least, **_with_required(spec, least)}), "", environ={})


def _with_required(part: dict[str, Any], least: dict[str, Any]) -> dict[str, Any]:
    """A partial spec's sections, completed with their required keys."""
    return {
        name: {**least[name], **keys} if isinstance(least.get(name), dict) else keys
        for name, keys in part.items()
    }


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[^`\s…*<]*)`", text(page))
    for code in blocks(page, "bash", "console"):
        named += re.findall(r"(?<![\w/.=])((?:specs|k8s)/[\w./-]+)", code)
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_table_of_packages_names_every_room_and_what_it_imports() -> None:
    page = text(DOCS / "01-how-it-works.md")
    table = page.partition("| package | holds | imports |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", table, re.MULTILINE)
    listed = {room: set(names.split(", ")) - {"nothing"} for room, names in rows}
    assert listed == {room: stated(room) for room in RANK}


@pytest.mark.parametrize("index", [DOCS / "README.md", DOCS / "zh" / "README.md"], ids=name_of)
def test_the_index_names_every_page(index: Path) -> None:
    linked = set(re.findall(r"\]\(([^)#]+)", text(index)))
    pages = {page.name for page in index.parent.glob("*.md")}
    assert pages - {"README.md"} <= linked


@cache
def messages() -> tuple[str, ...]:
    """Every string in the code except docstrings, with `…` for each interpolated value."""
    strings = []
    for file in (ROOT / "job").rglob("*.py"):
        every = list(ast.walk(ast.parse(text(file))))
        docstrings = [node.value for node in every if isinstance(node, ast.Expr)]
        for node in every:
            if node in docstrings:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                strings.append(
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                )
    strings.append(text(ROOT / "job" / "spec" / "schema" / "job.v1.json"))
    return tuple(message.replace("`", "") for message in strings)


@pytest.mark.parametrize("page", ["11-your-own-data.md", "13-faq.md"])
def test_quoted_messages_are_those_of_the_code(page: str) -> None:
    rows = re.findall(r"^\| (`.+?) \|", text(DOCS / page), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row) if " " in quote]
    assert len(quoted) > 5
    assert not [quote for quote in quoted if not any(quote in message for message in messages())]


def test_the_table_of_exit_codes_is_that_of_the_errors() -> None:
    page = text(ROOT / "docs" / "02-results.md")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    codes = {kind.exit_code for kind in errors.JobError.__subclasses__()} | {errors.STOPPED}
    assert listed == {errors.OK, errors.JobError.exit_code} | codes


@pytest.mark.parametrize("key", ["model.family", "model.engine", "data.train.format"])
def test_the_support_matrix_has_every_choice(key: str) -> None:
    node = keys.at(tuple(key.split(".")))
    assert node is not None
    page = text(ROOT / "docs" / "17-support.md")
    assert [choice for choice in node["enum"] if f"`{choice}`" not in page] == []


@pytest.mark.parametrize("page", ["10-tutorial.md", "zh/10-tutorial.md"])
def test_the_tutorial_names_every_difference_to_the_shipped_spec(page: str) -> None:
    [code] = [code for code in blocks(DOCS / page, "yaml") if code.startswith("version")]
    shipped = text(ROOT / "specs" / "ernie-4.5-vl-28b-latex.yaml")
    one, other = (_flat(load_spec(spec, "", environ={}).resolved) for spec in (code, shipped))
    differ = {key.split(".")[-1] for key, value in one.items() if value != other[key]}
    note = text(DOCS / page).partition("job run my.yaml\n```\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", note)) == differ
    assert {str(each["train.max_steps"]) for each in (one, other)} <= set(re.findall(r"\d+", note))


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat


def test_the_readme_names_every_spec_that_ships() -> None:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven")
    specs = sorted(path.name for path in (ROOT / "specs").glob("*.yaml"))
    table = text(ROOT / "README.md").partition(f"{words[len(specs)].title()} specs ship:")[2]
    assert sorted(re.findall(r"\(specs/([\w.-]+\.yaml)\)", table)) == specs


def test_the_plan_that_is_shown_is_of_the_spec_that_ships() -> None:
    [plan] = [code for code in blocks(DOCS / "15-plan.md", "console") if "plan of " in code]
    settings = plan.partition("from the defaults\n")[2].partition("\n\n")[0]
    shown = dict(line.split(None, 1) for line in settings.splitlines())
    loaded = load_spec(text(ROOT / "specs" / "ernie-4.5-vl-28b-latex.yaml"), "", environ={})
    values = _flat(loaded.resolved)
    assert shown == {key: str(values[key]) for key in loaded.changed}


def test_the_accelerators_of_a_plan_are_those_of_its_page() -> None:
    page = text(ROOT / "docs" / "15-plan.md")
    [listed] = re.findall(r"all that are known:\n(.*?)\.\n", page, re.DOTALL)
    assert re.findall(r"`([^`]+)`", listed) == list(ACCELERATORS)


def test_the_keys_of_a_plan_s_json_are_on_its_page() -> None:
    page = text(ROOT / "docs" / "15-plan.md").partition("## As JSON")[2]
    top = {field.name for field in dataclasses.fields(Plan)} - {"name", "output", "stages_unknown"}
    assert [name for name in sorted(top) if f"`{name}`" not in page] == []


@every_page
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    known = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", text(file))
    }
    assert set(re.findall(r"`(test_\w+)`", text(page))) <= known


@pytest.mark.parametrize("image", IMAGES, ids=name_of)
def test_a_diagram_is_valid_has_alt_text_and_loads_nothing(
    image: Path,
) -> None:
    root = ElementTree.fromstring(text(image))  # noqa: S314 - our own files
    assert root.get("role") == "img"
    assert root.get("aria-label") or root.get("aria-labelledby")
    assert not re.search(r"""(href|src|url\()\s*=?["'(]*https?:""", text(image))


def test_every_cell_of_the_families_table_names_its_test_or_says_that_there_is_none() -> None:
    page = text(ROOT / "docs" / "14-model-families.md")
    head, *rows = re.findall(r"^\| (.+) \|$", page.partition("Each cell")[2], re.MULTILINE)
    assert re.findall(r"`(\w+)`", head) == [family.name for family in FAMILIES]
    wanted = {"load", "train", "LoRA targets", "merge", "vLLM, merged", "vLLM, adapter"}
    assert wanted <= {row.split(" | ")[0] for row in rows}
    for row in rows:
        for cell in row.split(" | ")[1:]:
            assert "`test_" in cell or cell.startswith(("not tested", "none: ")), cell
