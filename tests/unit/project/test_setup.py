"""What `make setup` can be asked for."""

import os
import re
import subprocess

import pytest

from tests.jobs import ROOT, job

INSTALL = ROOT / "requirements" / "install.sh"


def offered() -> list[str]:
    """The extras that the help of `make setup` names."""
    [line] = re.findall(r"^setup: ##.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    [extras] = re.findall(r'EXTRAS="([^"]+)"', line)
    return str(extras).split()


@pytest.mark.parametrize("extra", ["base", "serving", "../dev", "nothing"])
def test_an_extra_that_is_not_offered_is_refused_before_anything_is_installed(extra: str) -> None:
    # A Python that does nothing, so that a test that fails installs nothing either.
    environ = {**os.environ, "PYTHON": "true", "EXTRAS": f"dev {extra}"}
    done = subprocess.run(
        ["bash", str(INSTALL)], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert f"EXTRAS names '{extra}'; known: dev {' '.join(offered())}" in done.stderr
    assert "installing" not in done.stderr


def test_what_is_offered_is_locked() -> None:
    assert offered()
    for extra in offered():
        assert (INSTALL.parent / f"{extra}.txt").is_file()


def test_a_cuda_build_is_refused_where_rocm_was_asked_for() -> None:
    [check] = re.findall(r"<<'PY'\n(.*?)^PY$", INSTALL.read_text(), re.MULTILINE | re.DOTALL)
    for accelerator, code in (("rocm", 1), ("default", 0)):
        done = job(accelerator, code=check)
        assert done.code == code, done.err
        assert ("but TORCH_INDEX gave the" in done.err) == bool(code)
