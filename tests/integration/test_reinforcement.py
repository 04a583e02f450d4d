"""Whole jobs with the stage `reinforce`, by the command."""

import hashlib
import signal
from pathlib import Path

import pytest

from tests import held
from tests.jobs import SMALL, job, read_json, sets, start

SETTINGS = {
    **SMALL,
    "train.max_steps": 2,
    "train.eval_strategy": "no",
    "train.eval_steps": "null",
    "train.load_best_model_at_end": "false",
    "data.train.limit": 16,
    "data.eval.limit": 4,
    "data.validation.limit": 4,
    "eval.max_samples": 4,
    "eval.metrics": "[exact_match, cer]",
    "eval.baseline": "false",
    "export.merged.enabled": "false",
    "reinforce.num_generations": 2,
    "reinforce.per_device_train_batch_size": 4,
    "reinforce.temperature": 3,
    "reinforce.max_completion_length": 6,
    "reinforce.logging_steps": 1,
    "reinforce.num_iterations": 2,
    "reinforce.save_steps": 2,
    "reinforce.eval_steps": 2,
    "reinforce.metric_for_best_model": "cer",
}


def run(output: Path, cache: Path, *, steps: int = 4) -> list[str]:
    settings = {**SETTINGS, "reinforce.max_steps": steps, "runtime.cache_dir": cache}
    return ["run", "specs/latex-grpo.yaml", "--output", str(output), *sets(settings)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow(minutes=2)
def test_a_stage_that_is_stopped_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = job(*run(tmp_path / "whole", cache))
    assert done.code == 0, done.err
    whole = read_json(tmp_path / "whole" / "run.json")
    summary = whole["stages"]["reinforce"]["summary"]
    assert summary["steps"] == 4
    assert summary["learned"]
    assert whole["validation"]["metric"] == "eval_cer"
    assert "Answers in step 1" in (tmp_path / "whole" / "report.html").read_text()
    card = (tmp_path / "whole" / "reinforced" / "adapter" / "README.md").read_text()
    assert "steps of reinforcement (GRPO)" in card

    stopped = start("1/4", *run(tmp_path / "stopped", cache), code=held.CODE)
    assert stopped.stderr is not None
    said = ""
    for line in stopped.stderr:
        said += line
        if "INFO reinforce step=1/4" in line:
            stopped.send_signal(signal.SIGTERM)
            break
    said += stopped.stderr.read()
    assert stopped.wait(60) == 143, said
    assert "of reinforce; the checkpoint of step" in said
    assert not (tmp_path / "stopped" / ".stages" / "reinforce.json").exists()

    again = job(*run(tmp_path / "stopped", cache))
    assert again.code == 0, again.err
    assert "train: complete, skipped" in again.err
    assert "resuming step=" in again.err
    adapter = Path("reinforced/adapter/adapter_model.safetensors")
    assert digest(tmp_path / "stopped" / adapter) == digest(tmp_path / "whole" / adapter)
    history = Path("reinforced/history.jsonl")
    first, second = ((tmp_path / name / history).read_text() for name in ("whole", "stopped"))
    assert first == second
