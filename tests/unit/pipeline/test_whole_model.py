"""Stages that hold the whole model on one device are refused beforehand if it does not fit."""

from types import SimpleNamespace
from typing import Any

import pytest

from job import families
from job.engines.device import Accelerator
from job.engines.memory import weight_bytes
from job.errors import OutOfMemoryError
from job.pipeline import whole_model
from job.pipeline.runner import COMMANDS
from job.spec.load import load_spec
from tests.jobs import ROOT

FULL = "lora={method: full}"
SHARDED = "runtime.distributed=fsdp2"
DORA = "lora={use_dora: true}"


def run_of(*settings: str, room: int, complete: tuple[str, ...] = ()) -> Any:
    """A run on a device that has `room` bytes more than the weights in fp32 take."""
    text = (ROOT / "specs/latex.yaml").read_text()
    spec = load_spec(text, "latex", settings, environ={}).spec
    family, skeleton = families.architecture(spec.model)
    memory = weight_bytes(family, skeleton, 4) + room
    markers = SimpleNamespace(exists=lambda name: name in complete)
    return SimpleNamespace(
        spec=spec,
        accelerator=Accelerator(kind="cpu", name="test", memory_bytes=memory),
        output=SimpleNamespace(stages=SimpleNamespace(markers=markers)),
    )


def test_a_run_is_refused_with_the_stages_that_need_the_whole_model() -> None:
    run = run_of(FULL, SHARDED, room=-1)
    with pytest.raises(OutOfMemoryError) as caught:
        whole_model.require_room(run, COMMANDS["run"])
    [problem] = caught.value.problems
    assert "must fit on one device in baseline, eval, export: its weights take" in problem.message
    assert problem.fix is not None
    assert "use the command train" in problem.fix
    whole_model.require_room(run, COMMANDS["train"])


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ((FULL, SHARDED, "eval.baseline=false"), "eval, export"),
        (("lora={}", SHARDED, "export.merged.enabled=false"), "baseline, eval"),
        ((FULL, SHARDED, "model.init=random"), "baseline, train, eval, export"),
        ((DORA, SHARDED, "model.dtype=float32"), "baseline, train, eval, export"),
    ],
)
def test_only_stages_are_named_that_run_and_need_it(settings: tuple[str, ...], stages: str) -> None:
    run = run_of(*settings, room=-1)
    with pytest.raises(OutOfMemoryError, match=f"one device in {stages}: "):
        whole_model.require_room(run, COMMANDS["run"])


def test_nothing_is_refused_that_fits_or_is_complete_or_not_sharded() -> None:
    whole_model.require_room(run_of(FULL, SHARDED, room=0), COMMANDS["run"])
    whole_model.require_room(run_of(FULL, room=-1), COMMANDS["run"])
    made = ("baseline", "eval", "export")
    whole_model.require_room(run_of(FULL, SHARDED, room=-1, complete=made), COMMANDS["run"])
