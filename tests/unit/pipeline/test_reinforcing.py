"""What the stage that reinforces requires of the run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import SpecError
from job.pipeline.reinforcing import require_one_process
from job.spec.load import load_spec


def test_several_processes_are_told_to_start_one() -> None:
    """Not to set runtime.distributed: none, which refuses the same start and names auto."""
    spec = load_spec(Path("specs/latex-grpo.yaml").read_text(), "spec", environ={}).spec
    run: Any = SimpleNamespace(processes=1, spec=spec)
    require_one_process(run)
    run.processes = 2
    with pytest.raises(SpecError, match="runs in one process, but this job has 2") as refused:
        require_one_process(run)
    fix = refused.value.problems[0].fix
    assert fix is not None
    assert fix.startswith("start one process, without torchrun")
    assert "runtime.distributed" not in fix
