"""Runs the job in processes forked from one that has the libraries loaded already.

Importing them takes longer than most of the tests' runs. What runs is the command itself, in a
process of its own with its own environment, standard streams and exit code.
"""

import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest

context = get_context("forkserver")
context.set_forkserver_preload(["tests.integration.preload"])

# Libraries read these while they are imported.
_READ_AT_IMPORT = (
    "BNB_", "CUDA_", "FSSPEC_", "HF_", "HUGGINGFACE_", "KMP_", "LD_", "MKL_", "OMP_", "PYTHON",
    "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "UNSLOTH_", "XDG_",
)  # fmt: skip
_STARTED_WITH = {**os.environ}


def fits(environ: Mapping[str, str]) -> bool:
    """Whether a process that is forked acts in this environment as one that starts anew."""
    names = environ.keys() | _STARTED_WITH.keys()
    return all(
        environ.get(name) == _STARTED_WITH.get(name)
        for name in names
        if name.startswith(_READ_AT_IMPORT)
    )


def run(
    arguments: Sequence[str], *, cwd: Path, environ: Mapping[str, str], timeout: float
) -> tuple[int, str, str]:
    """Runs `python -m job` to its end; its exit code, standard output and standard error."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(
            target=_main, args=(list(arguments), str(cwd), dict(environ), str(out), str(err))
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail(f"not done in {timeout} s: job {' '.join(arguments)}\n{err.read_text()}")
        return process.exitcode, out.read_text(), err.read_text()


def _main(arguments: list[str], cwd: str, environ: dict[str, str], out: str, err: str) -> None:
    for number, path in enumerate((os.devnull, out, err)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.argv = ["job", *arguments]
    runpy.run_module("job", run_name="__main__", alter_sys=True)
