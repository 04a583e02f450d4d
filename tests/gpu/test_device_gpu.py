"""PyTorch's GPU allocator in a job."""

import subprocess
import sys

import pytest
import torch

from tests.jobs import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.version.cuda is None, reason="for NVIDIA GPUs"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
CODE = """
import torch
from job.engines.device import detect
from job.spec.load import load_spec
detect(load_spec(open("specs/latex.yaml").read(), "", environ={}).spec.runtime)
held = torch.ones(1024, device="cuda")
print([segment["is_expandable"] for segment in torch.cuda.memory_snapshot()])
"""


# In its own process: PyTorch reads the setting once.
def test_its_segments_are_expandable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[True]"
