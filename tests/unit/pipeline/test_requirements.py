"""What is said before the expensive work of a run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job import log
from job.pipeline.requirements import log_idle_gpus
from job.spec.load import load_spec


def test_gpus_that_would_idle_are_told_with_the_command_that_uses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[dict[str, object]] = []
    monkeypatch.setattr(log, "info", lambda _, **values: said.append(values))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    spec = load_spec(Path("specs/latex.yaml").read_text(), "spec", environ={}).spec
    reinforced = load_spec(Path("specs/latex-grpo.yaml").read_text(), "spec", environ={}).spec
    gpu, cpu = SimpleNamespace(kind="cuda"), SimpleNamespace(kind="cpu")

    def started(**more: Any) -> None:
        run: Any = SimpleNamespace(
            accelerator=gpu, processes=1, engine_name="transformers", spec=spec, command="run"
        )
        vars(run).update(more)
        log_idle_gpus(run)

    started(accelerator=cpu)
    started(processes=8)
    started(engine_name="unsloth")
    started(spec=reinforced)
    started(spec=replace(spec, runtime=replace(spec.runtime, distributed="none")))
    assert not said
    started()
    command = "torchrun --nproc-per-node 8 -m job run SPEC"
    assert said == [{"gpus": 8, "command_for_all": command}]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    started()
    assert len(said) == 1
