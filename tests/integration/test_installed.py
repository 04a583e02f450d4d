"""The built wheel: complete, and a command that runs from any folder and imports nothing there."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import yaml

from tests.jobs import ROOT, SMALL, read_json, sets

HOSTILE = ("yaml", "numpy", "json", "torch", "typer", "fsspec", "huggingface_hub", "jinja2")
"""Modules of the folder that the command starts in; importing one ends the process."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git tracks or would add, and from nothing else."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in git_files(""):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--wheel-dir", str(built)]
    command += ["--no-build-isolation", "--no-deps", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installs the wheel into; its packages are those of this environment."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*command, str(target), str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with modules that must not be imported: a package `job` among them."""
    folder = tmp_path / "foreign"
    (folder / "job").mkdir(parents=True)
    for name in (*(f"{name}.py" for name in HOSTILE), "job/__init__.py", "job/__main__.py"):
        (folder / name).write_text(f"raise SystemExit('{name} of the folder was imported')\n")
    return folder


def git_files(below: str) -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run([*command, "--", below or "."], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def command(
    installed: Path, cwd: Path, *arguments: str, **environ: str
) -> "subprocess.CompletedProcess[str]":
    """Runs the installed console script."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    clean |= {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1", **environ}
    script = installed / "bin" / "finetune-job"
    return subprocess.run(
        [sys.executable, str(script), *arguments], cwd=cwd, env=clean, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = {name for name in git_files("job") if not (ROOT / name).is_symlink()}
    # The measurements behind `plan` are a link to those of the benchmarks.
    measured = {
        f"job/planning/measurements/{Path(n).name}" for n in git_files("benchmarks/results")
    }
    assert held == tracked | measured
    assert {Path(name).suffix for name in held} >= {".json", ".jinja", ".css", ".safetensors"}


def test_the_wheel_says_what_it_is_and_asks_for_ranges_rather_than_pins(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = metadata(wheel)
    assert (said["Name"], said["Version"]) == ("finetune-job", project["version"])
    assert (said["License-Expression"], said["License-File"]) == ("Apache-2.0", "LICENSE")
    assert said["Description-Content-Type"] == "text/markdown"
    assert str(said.get_payload()).strip().startswith("# finetune-job")
    required = [line for line in said.get_all("Requires-Dist") or () if "extra ==" not in line]
    assert len(required) == len(project["dependencies"])
    assert not [line for line in required if re.search(r"==(?!.*\*)", line)]
    with zipfile.ZipFile(wheel) as archive:
        [points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "finetune-job = job.__main__:main" in archive.read(points).decode()
        [text] = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(text) == (ROOT / "LICENSE").read_bytes()


def test_every_range_includes_the_locked_version() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked: dict[str, str] = {}
    for lock in ("base", "torch", *project["optional-dependencies"]):
        text = (ROOT / "requirements" / f"{lock}.txt").read_text()
        locked |= dict(re.findall(r"^([\w.-]+)==([^ ;\n]+)", text, re.MULTILINE))
    extras = project["optional-dependencies"].values()
    for line in (*project["dependencies"], *(line for extra in extras for line in extra)):
        wanted = Requirement(line)
        assert wanted.specifier.contains(locked[wanted.name.lower()]), line


def test_the_installed_command_imports_nothing_from_the_folder_it_starts_in(
    installed: Path, foreign: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in installed.rglob("*")}
    for name in ("latex.yaml", "text.yaml"):
        (foreign / name).write_bytes((ROOT / "specs" / name).read_bytes())
    validated = command(installed, foreign, "validate", "latex.yaml")
    assert validated.returncode == 0, validated.stdout + validated.stderr
    schema = command(installed, foreign, "schema")
    assert schema.stdout == (ROOT / "job/spec/schema/job.v1.json").read_text(encoding="utf-8")
    planned = command(installed, foreign, "plan", "latex.yaml", "--format", "json")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert json.loads(planned.stdout)
    shown = command(installed, foreign, "--version")
    assert shown.stdout.strip() == metadata_version(installed)
    assert not [path for path in foreign.iterdir() if path.name == "outputs"]
    assert {path: path.stat().st_mtime_ns for path in installed.rglob("*")} == before


def test_the_revision_is_the_jobs_own_and_never_that_of_the_folder_it_is_installed_in(
    installed: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(installed, tmp_path / "repository"))
    for words in (["init"], ["add", "bin"], ["commit", "--message", "of the user"]):
        identity = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
        subprocess.run(["git", *identity, *words], cwd=copy, check=True, capture_output=True)

    def revision() -> str:
        code = "from job.artifacts.provenance import source_revision; print(source_revision())"
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(copy)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert revision() == f"v{metadata_version(copy)}"
    [info] = copy.glob("*.dist-info")
    record = {"url": "https://example.com/job.git", "vcs_info": {"commit_id": "0123456789abcdef"}}
    (info / "direct_url.json").write_text(json.dumps(record))
    assert revision() == "0123456789ab"


def metadata_version(installed: Path) -> str:
    [info] = installed.glob("*.dist-info")
    return str(message_from_string((info / "METADATA").read_text())["Version"])


@pytest.mark.slow
def test_the_installed_command_runs_a_job_with_workers_in_a_foreign_folder(
    installed: Path, foreign: Path
) -> None:
    """Formulas are rendered, and rows prepared, by processes that the command starts."""
    before = {path: path.stat().st_mtime_ns for path in installed.rglob("*")}
    spec = yaml.safe_load((ROOT / "specs" / "latex.yaml").read_text())
    (foreign / "spec.yaml").write_text(yaml.safe_dump(spec))
    settings: dict[str, object] = {
        **SMALL,
        "data.train.limit": 48,
        "data.eval.limit": 6,
        "data.num_proc": 2,
    }
    settings |= {"output.uri": "out", "runtime.cache_dir": "cache"}
    done = command(installed, foreign, "run", "spec.yaml", *sets(settings), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_json(foreign / "out" / "run.json")
    assert run["status"] == "succeeded"
    # No checkout is near: the version stands for the revision.
    assert run["versions"]["source_revision"] == f"v{metadata_version(installed)}"
    assert {path: path.stat().st_mtime_ns for path in installed.rglob("*")} == before
