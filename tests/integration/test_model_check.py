"""The model is checked on a thread beside prep; meanwhile prep imports nothing that it imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import FORMULAS, ROOT, sets
from tests.models import BUILDERS

WATCHED = """
import json, os, sys, threading
from pathlib import Path
from job.pipeline.context import RunContext

watching, imported = False, {True: [], False: []}


def hook(event, arguments):
    if watching and event == "import":
        imported[threading.current_thread() is threading.main_thread()].append(arguments[0])


def begins(self, check):
    global watching
    begin(self, check)
    watching = True


def ends(self, *, wait=True):
    if wait:
        require(self)
        Path(os.environ["IMPORTED"]).write_text(json.dumps([*imported.values()]))
        os._exit(0)


begin, require = RunContext.begin_model_check, RunContext.require_checked_model
RunContext.begin_model_check, RunContext.require_checked_model = begins, ends
sys.addaudithook(hook)
from job.__main__ import main as job
job()
"""
"""The job until its rows are prepared; writes what its threads import meanwhile."""


@pytest.mark.parametrize("kind", ["builtin", "qwen_vl"])
def test_prep_imports_no_library_that_the_check_imports(kind: str, tmp_path: Path) -> None:
    """Two threads that import Transformers at once may find it without its attributes."""
    settings = {**FORMULAS, "runtime.cache_dir": tmp_path / "cache"}
    if kind != "builtin":
        BUILDERS[kind](tmp_path / "base")
        settings["model.model_name_or_path"] = tmp_path / "base"
    written = tmp_path / "imported.json"
    command = ["train", "specs/latex.yaml", "--output", str(tmp_path / "out"), *sets(settings)]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "IMPORTED": str(written)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "prep eval" in done.stderr
    prep, check = (set(names) for names in json.loads(written.read_text()))
    assert "peft" in check
    assert not [name for name in prep & check if not ours_or_python(name)]
    assert not {"torch", "transformers"} & set(map(package, prep))


def ours_or_python(module: str) -> bool:
    return package(module) in {"job", *sys.stdlib_module_names}


def package(module: str) -> str:
    return module.partition(".")[0]
