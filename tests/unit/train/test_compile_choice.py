"""Whether blocks are compiled if the spec leaves it to the job."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from job.engines.device import Accelerator
from job.engines.ways import Ways
from job.spec.load import load_spec
from job.spec.types import JobSpec
from job.train import compiled_training
from job.train.compile_choice import COMPILE_SECONDS, StepWork, choose, may_pay
from tests.jobs import ROOT

TEXT = (ROOT / "specs" / "ernie-4.5-vl-28b-latex.yaml").read_text()
REFERENCE = load_spec(TEXT, "spec.yaml", environ={"BUCKET": "b", "OUTPUT": "o"}).spec


def spec(**train: Any) -> JobSpec:
    return replace(REFERENCE, train=replace(REFERENCE.train, torch_compile="auto", **train))


def work(steps: int, tokens: float = 600, *, captured: bool = True) -> StepWork:
    return StepWork(steps=steps, tokens_a_step=tokens, blocks=60, captured=captured)


def test_a_short_training_is_not_compiled_and_the_reason_has_both_times() -> None:
    choice = choose(spec(), work(60), on_gpu=True)
    assert str(choice) == ("no: 60 steps would save about 1.9s, and compiling takes about 1m00s")


@pytest.mark.parametrize(
    ("captured", "tokens", "saved"), [(True, 600, 0.0312), (False, 600, 0.212), (False, 2e4, 0.44)]
)
def test_a_training_is_compiled_once_its_steps_save_more_than_compiling_takes(
    captured: bool, tokens: float, saved: float
) -> None:
    enough = int(COMPILE_SECONDS / saved) + 1
    for steps, expected in ((enough - 1, False), (enough, True)):
        choice = choose(spec(), work(steps, tokens, captured=captured), on_gpu=True)
        assert choice.compiled is expected, choice


@pytest.mark.parametrize("steps", [60, 70, 300, 3000, -1])
def test_blocks_are_compiled_only_if_the_spec_already_says_that_it_may_pay(steps: int) -> None:
    short = spec(max_steps=steps)
    longest = 4 * short.train.max_length  # tokens of its rows
    for blocks, captured in ((60, True), (60, False), (190, True), (190, False)):
        given = replace(work(max(steps, 1), longest, captured=captured), blocks=blocks)
        assert may_pay(short.train) or not choose(short, given, on_gpu=True).compiled
    assert may_pay(short.train) == (steps != 60)


def test_fewer_blocks_save_less() -> None:
    half = replace(work(2000), blocks=30)
    assert half.saved_seconds == pytest.approx(work(2000).saved_seconds / 2)


@pytest.mark.parametrize(
    ("train", "more", "reason"),
    [
        ({}, {"on_gpu": False}, "there is no GPU"),
        ({}, {"patches_forward": True}, "forward passes of its own"),
        ({"gradient_checkpointing": True}, {}, "gradient checkpointing"),
        ({"fit": "off"}, {}, "train.fit is off"),
    ],
)
def test_a_long_training_is_not_compiled_if_something_excludes_it(
    train: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    choice = choose(spec(**train), work(10**6), **{"on_gpu": True, **more})
    assert (choice.compiled, reason in choice.reason) == (False, True)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_spec_is_obeyed_however_short_or_long_the_training(wanted: bool) -> None:
    named = replace(REFERENCE, train=replace(REFERENCE.train, torch_compile=wanted))
    for steps in (1, 10**6):
        assert choose(named, work(steps), on_gpu=False).compiled is wanted


def test_sharded_blocks_and_trainings_of_unknown_length_are_not_compiled() -> None:
    sharded = replace(spec(), runtime=replace(REFERENCE.runtime, distributed="fsdp2"))
    assert not choose(sharded, work(10**6), on_gpu=True).compiled
    assert not choose(spec(), None, on_gpu=True).compiled


@pytest.mark.parametrize("missing", ["not possible on this machine: no C++ compiler", None])
def test_without_a_compiler_a_long_training_is_not_compiled(
    missing: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = SimpleNamespace(steps=10**6)
    monkeypatch.setattr(compiled_training, "planned_sampler", lambda *_, **__: None)
    monkeypatch.setattr(compiled_training, "schedule_of", lambda *_: schedule)
    monkeypatch.setattr(compiled_training, "obstacle", lambda _: missing)
    context: Any = SimpleNamespace(
        spec=spec(),
        ways=Ways(),
        accelerator=Accelerator(kind="cuda", name="test", memory_bytes=2**30),
        engine=SimpleNamespace(patches_forward=False, autocast=False, device=torch.device("cuda")),
    )
    rows: Any = SimpleNamespace(statistics={"tokens_a_row": {"mean": 100.0}})
    model = torch.nn.Sequential(GradientCheckpointingLayer())
    adapted: Any = SimpleNamespace(model=model, padding_free=True)
    blocks, choice = compiled_training.compile_model(context, rows, adapted)
    assert (choice.compiled, blocks is None) == (missing is None, missing is not None)
    said = capsys.readouterr().err
    assert ("no C++ compiler" in said) == (missing is not None)
    assert "blocks are compiled" in said or missing is not None
