"""Imports point downward only, each room says what it imports, and light commands stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parents[3] / "job"

LOOSE = {"__init__", "__main__", "errors", "log", "signals", "redaction"}
"""What stands outside the rooms; everything may import it."""

LONGEST_FUNCTION = 80
"""Lines."""
MOST_UNTYPED = 20
"""Parameters and results of type `Any`."""

# From the bottom up; a room may import those in earlier rows.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("spec", "storage", "distributed"),
    ("telemetry", "local"),
    ("artifacts",),
    ("prep",),
    ("families",),
    ("engines",),
    ("train", "evaluation", "export"),
    ("rewards",),
    ("reinforce",),
    ("pipeline", "drafting"),
    ("planning",),
    ("kubernetes", "doctor", "parity"),
    ("cli",),
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}


def imports_of(path: Path) -> set[str]:
    """The parts of `job` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("job.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "job":
            found |= {f"job.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("job."):
            found.add(str(node.module))
    return {name.split(".")[1] for name in found} - {"__version__"}


def rooms_of(room: str) -> set[str]:
    """The other rooms that files of a room import."""
    found = set().union(*(imports_of(path) for path in (JOB / room).rglob("*.py")))
    return found - LOOSE - {room}


def stated(room: str) -> set[str]:
    """The rooms that a room's own docstring says it imports."""
    text = ast.get_docstring(ast.parse((JOB / room / "__init__.py").read_text(encoding="utf-8")))
    found = re.search(r"Imports: ([a-z, \n]+)\.", text or "")
    assert found is not None, f"job/{room}/__init__.py has no `Imports: …` line"
    names = " ".join(found[1].split())
    return set() if names == "no other room" else set(names.split(", "))


def test_the_top_of_the_package_is_rooms_and_a_few_loose_modules() -> None:
    there = {path.stem for path in JOB.glob("*.py")}
    there |= {path.parent.name for path in JOB.glob("*/__init__.py")}
    assert there == LOOSE | set(RANK)


@pytest.mark.parametrize("room", RANK)
def test_a_room_imports_what_it_says_and_only_from_below(room: str) -> None:
    assert rooms_of(room) == stated(room)
    assert stated(room) <= {below for below, rank in RANK.items() if rank < RANK[room]}


@pytest.mark.parametrize("name", sorted(LOOSE - {"__init__", "__main__"}))
def test_loose_modules_import_no_room(name: str) -> None:
    paths = [JOB / f"{name}.py"] if (JOB / f"{name}.py").exists() else (JOB / name).rglob("*.py")
    assert set().union(*map(imports_of, paths)) <= LOOSE


def test_no_file_name_stands_for_three_things() -> None:
    names = [path.name for path in JOB.rglob("*.py") if path.name != "__init__.py"]
    assert {name for name in names if names.count(name) > 2} == set()


def test_a_function_is_read_without_scrolling_far() -> None:
    long = {
        f"{path.relative_to(JOB)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in JOB.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    }
    assert long == {}


def test_what_stays_untyped_says_why() -> None:
    """ruff's ANN401 refuses `Any` at a function's border; each exception carries its reason."""
    marked = [
        line
        for path in JOB.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "noqa: ANN401" in line
    ]
    assert len(marked) <= MOST_UNTYPED
    assert [line for line in marked if not re.search(r"ANN401 - \w+", line)] == []


@pytest.mark.parametrize(
    "arguments", [["validate", "specs/latex.yaml"], ["schema"], ["reference", "train.optim"]]
)
def test_light_commands_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["job", *{arguments!r}]
try:
    from job.cli.app import main
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = ("torch", "transformers", "datasets", "peft", "numpy", "fsspec", "boto3", "matplotlib")
loaded = [name for name in heavy if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=JOB.parent
    )
    assert done.returncode == 0, done.stderr
