"""Attention that packed rows do not have: the rows are padded, and the training is the same."""

import pytest
import torch

from benchmarks.training import UNVALIDATED, formula_rows, tiny_family, train_stage
from job import families
from job.engines.device import detect
from job.engines.padding_free import why_padded
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests.jobs import ROOT

SETTINGS = (
    *UNVALIDATED,
    "runtime.accelerator=cpu",
    "train.max_steps=2",
    "train.gradient_checkpointing=false",
    "train.dataloader_num_workers=0",
    "train.torch_compile=false",
    "train.logging_steps=1",
)


def spec_with(*more: str) -> JobSpec:
    path = ROOT / "specs/latex.yaml"
    return load_spec(path.read_text(), str(path), [*SETTINGS, *more], environ={}).spec


def losses(attention: str) -> list[float]:
    spec = spec_with(f"model.attn_implementation={attention}")
    family = tiny_family(spec)
    model = family.initialize(
        seed=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attn_implementation="sdpa" if attention == "auto" else attention,
    )
    _, _, history = train_stage(spec, detect(spec.runtime), family, model, list(formula_rows(8)))
    return [entry["loss"] for entry in history if "loss" in entry]


def test_eager_attention_pads_the_rows_says_so_and_trains_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    packed = losses("auto")
    assert "rows are padded" not in capsys.readouterr().err
    padded = losses("eager")
    assert padded == pytest.approx(packed, abs=1e-4)
    assert "rows are padded: model.attn_implementation is eager" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "patches_forward", "reason"),
    [
        ((), False, None),
        (("model.attn_implementation=sdpa",), False, None),
        (("model.attn_implementation=eager",), False, "model.attn_implementation is eager"),
        (("train.padding_free=false",), False, "train.padding_free is false"),
        ((), True, "the engine has its own forward pass"),
    ],
)
def test_why_rows_are_padded_is_one_reason(
    settings: tuple[str, ...], patches_forward: bool, reason: str | None
) -> None:
    family = families.Ernie45VL
    assert why_padded(spec_with(*settings), family, patches_forward=patches_forward) == reason
    vlm = why_padded(spec_with(), families.Vlm, patches_forward=False)
    assert vlm == "the family vlm has no padding-free step"
