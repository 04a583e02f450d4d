"""Imports point downward only, and the light commands load nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "job"

# From the bottom up; a module may import what stands in an earlier row, or in its own package.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("redaction", "errors", "log", "signals", "background"),
    ("place",),
    ("peers",),
    ("spec",),
    ("storage",),
    ("holder", "nesting"),
    ("manifest", "provenance", "sbom", "lease", "telemetry"),
    ("writer",),
    ("local", "early", "unfinished"),
    ("inputs",),
    ("prep",),
    ("families",),
    ("sizes",),
    ("engines",),
    ("memory",),
    ("needs",),
    ("train", "evaluation", "export"),
    ("outputs", "kept", "given"),
    ("stages",),
    ("pipeline", "follower"),
    ("launch", "plan", "infer", "doctor", "fetch", "verify", "clean", "ask", "manifests"),
    ("help", "completion", "farewell"),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}


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


def files() -> list[Path]:
    return sorted(path for path in JOB.rglob("*.py") if path != JOB / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(JOB).parts[0].removesuffix(".py")


def test_every_part_has_its_layer() -> None:
    assert {part_of(path) for path in files()} == set(RANK)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(JOB)))
def test_imports_point_downward(path: Path) -> None:
    own = part_of(path)
    allowed = {part for part, rank in RANK.items() if rank < RANK[own]} | {own}
    if RANK[own] == 0:
        allowed |= set(LAYERS[0])
    assert imports_of(path) <= allowed


@pytest.mark.parametrize(
    "arguments", [["validate", "specs/latex.yaml"], ["schema"], ["reference", "train.optim"]]
)
def test_light_commands_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["job", *{arguments!r}]
try:
    from job.cli import main
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
