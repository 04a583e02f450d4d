"""The memory that a merge needs beside the merged model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT


@pytest.mark.slow
def test_a_merge_takes_less_than_an_eighth_of_the_weights_beside_the_model(tmp_path: Path) -> None:
    command = ["-m", "tests.integration.peak_of_export", str(tmp_path / "model")]
    # Tensors of full size are above any threshold under which malloc keeps what it is given back.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] > 2**29
    assert found["shards"] >= 10
    assert found["beside"] < found["weights"] / 8
