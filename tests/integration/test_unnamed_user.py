"""The job runs as any user, as OpenShift starts it: without a name, in group 0, with one folder."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.kubernetes import constants
from tests.jobs import ROOT, read_json, small_run

UID = 1_000_540_000
"""From the range that OpenShift gives to a namespace."""
IMAGE = ROOT / "containers/cpu.Containerfile"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)


@pytest.fixture
def cache() -> Iterator[Path]:
    """What the volume is to the pod: a folder of its group."""
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, UID + 1, 0)
    folder.chmod(0o770)
    yield folder
    shutil.rmtree(folder)


def run(cache: Path, *command: str) -> str:
    """Runs a command as that user, in the environment of the image."""
    settings = re.findall(r"^(?:ENV|   ) (\w+)=(\S+)", IMAGE.read_text(), re.MULTILINE)
    environ = {
        name: value.replace(constants.CACHE, str(cache), 1)
        for name, value in settings
        if name not in ("PATH", "PYTHONPATH", "JOB_SOURCE_REVISION")
    }
    assert {"HOME", "USER", "TORCHINDUCTOR_CACHE_DIR"} <= environ.keys()
    # It may read what root owns here, as everybody can in the image, and may write nothing of it.
    reading = "-all,+dac_read_search"
    user = ["setpriv", f"--reuid={UID}", "--regid=0", "--clear-groups", f"--inh-caps={reading}"]
    user += [f"--ambient-caps={reading}", f"--bounding-set={reading}"]
    done = subprocess.run(
        [*user, sys.executable, *command],
        env={**environ, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_looks_up_the_user_finds_a_name_and_a_cache(cache: Path) -> None:
    asked = (
        "import getpass, os; from torch._inductor.runtime.cache_dir_utils import cache_dir;"
        "print(os.getuid(), getpass.getuser(), cache_dir())"
    )
    assert run(cache, "-c", asked).split() == [str(UID), "job", str(cache / "inductor")]
    run(cache, "-m", "job", "validate", "specs/latex.yaml")


@pytest.mark.slow
def test_the_whole_job_runs(cache: Path) -> None:
    work = f"--set=runtime.workdir={cache / 'work'}"
    run(cache, "-m", "job", *small_run(str(cache / "out"), work, cache=cache))
    assert read_json(cache / "out" / "run.json")["status"] == "succeeded"
