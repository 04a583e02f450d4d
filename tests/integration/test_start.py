"""`python -m job` starts from any folder, and with any Python says what is missing."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from job import __main__, errors
from tests.jobs import ROOT

ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ENVIRON.pop("PYTHONSAFEPATH", None)


def python(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=ENVIRON, capture_output=True, text=True
    )


@pytest.fixture
def full_of_names(tmp_path: Path) -> Path:
    """A folder with a module for every name of Python's own, none of which may be imported.

    Without those that `python -m` itself imports before any code of the job.
    """
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "__main__.py").write_text("import sys; print(*sys.modules)")
    first = {*python("-m", "probe", cwd=tmp_path).stdout.split()}
    folder = tmp_path / "folder"
    folder.mkdir()
    others = ("typer", "yaml", "numpy", "PIL", "datasets", "torch", "tests", "fsspec", "jinja2")
    names = {*sys.stdlib_module_names, *others} - first - {"__main__"}
    assert {"tty", "json", "signal", "pathlib"} <= names
    for name in names:
        (folder / f"{name}.py").write_text("raise SystemExit(f'{__name__} is of the folder')\n")
    return folder


def test_nothing_is_imported_from_the_folder_that_it_starts_in(full_of_names: Path) -> None:
    done = python("-m", "job", "validate", str(ROOT / "specs" / "text.yaml"), cwd=full_of_names)
    assert done.returncode == 0, done.stdout + done.stderr


def test_processes_that_it_starts_import_nothing_from_there_either(full_of_names: Path) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    lines = (json.dumps({"messages": [turns[0] | {"content": f"{n}?"}, turns[1]]})
             for n in range(2100))  # fmt: skip
    (full_of_names / "rows.jsonl").write_text("\n".join(lines))
    (full_of_names / "spec.yaml").write_text(
        "version: 1\nname: test\nmodel: {model_name_or_path: 'builtin://ernie-vl-tiny'}\n"
        "data: {train: {uri: rows.jsonl}, num_proc: 2, text_only: true}\noutput: {uri: out}\n"
        "runtime: {cache_dir: cache}\n"
    )
    done = python("-m", "job", "prep", "spec.yaml", cwd=full_of_names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is of the folder" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", [("-m", "job"), ("bin/finetune-job",)])
def test_a_reward_is_not_imported_from_the_working_directory(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Not even in the job's own checkout, where Python itself would find it."""
    checkout = tmp_path / "checkout"
    (checkout / "bin").mkdir(parents=True)
    (checkout / "job").symlink_to(ROOT / "job")
    (checkout / "bin" / "finetune-job").write_text(
        # The path as an installation for development makes it.
        f"import sys; sys.path.insert(1, {str(checkout)!r})\n"
        "from job.__main__ import main; main()\n"
    )
    source = "raise SystemExit('own_rewards is imported')\n"
    (checkout / "own_rewards.py").write_text(source)
    (checkout / "spec.yaml").write_text(
        "version: 1\nname: test\nmodel: {model_name_or_path: 'builtin://ernie-vl-tiny'}\n"
        "data: {train: {uri: 'builtin://formulas', limit: 20}}\noutput: {uri: out}\n"
        "runtime: {cache_dir: cache, accelerator: cpu}\n"
        "reinforce: {allow_code: true, rewards: {name: 'own_rewards:reward'}}\n"
    )
    unnamed = {k: v for k, v in ENVIRON.items() if k != "PYTHONPATH"}
    for environ, kind, message in (
        (unnamed, errors.InputError,
         "no module own_rewards can be imported: it is looked for among the installed packages and "
         "in the folders of PYTHONPATH, and not in the working directory, which has it"),
        ({**unnamed, "PYTHONPATH": str(checkout)}, errors.SpecError,
         "cannot be imported: SystemExit: own_rewards is imported"),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command, "run", "spec.yaml"],
            cwd=checkout, env=environ, capture_output=True, text=True,
        )  # fmt: skip
        told = " ".join((done.stdout + done.stderr).split())
        assert (done.returncode, message in told) == (kind.exit_code, True), told


CHOOSING = """
import sys
from job import engines
from job.cli.app import app

def choose(*arguments, **more):
    sys.exit("imported" if "transformers" in sys.modules else 42)

engines.choose = choose
app(sys.argv[1:])
"""


def test_the_engine_is_chosen_before_transformers_is_imported(tmp_path: Path) -> None:
    """Unsloth patches it as it is imported, and a system prompt is checked by its tokenizers."""
    given = ["--set", "data.system=Read.", "--output", str(tmp_path / "out")]
    done = python("-c", CHOOSING, "run", str(ROOT / "specs/latex.yaml"), *given, cwd=tmp_path)
    assert done.returncode == 42, done.stderr


def test_a_python_without_the_packages_says_so_in_one_line(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    bare = tmp_path / "bare" / "bin" / "python"
    for cwd, environ in ((ROOT, {}), (tmp_path, {"PYTHONPATH": str(ROOT)})):
        done = subprocess.run(
            [bare, "-m", "job", "plan", "spec.yaml"], cwd=cwd, env=environ,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == errors.USAGE
        [line] = done.stderr.splitlines()
        assert "has no package typer, which the job needs. Fix: make setup" in line
        assert done.stdout == ""


def test_a_package_that_is_found_missing_later_is_named_with_what_to_do() -> None:
    found = errors.reported(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert str(found).startswith("python: has no package torch\n    fix: make setup")


def test_codes_known_before_anything_is_imported_are_those_of_the_errors() -> None:
    assert (__main__.USAGE, __main__.STOPPED) == (errors.USAGE, errors.STOPPED)


@pytest.mark.parametrize("name", ["python3.9", "python3.10", "python3.8"])
def test_an_older_python_says_so_in_one_line(name: str) -> None:
    older = shutil.which(name)
    works = older and subprocess.run([older, "-c", ""], capture_output=True).returncode == 0
    if not works:
        pytest.skip(f"{name} is not on this machine")
    assert older is not None
    done = subprocess.run([older, "-m", "job"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == errors.USAGE
    [line] = done.stderr.splitlines()
    assert "the job needs 3.11 or 3.12" in line
