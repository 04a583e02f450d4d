"""Passes captured as CUDA graphs: the losses and weights of the eager training."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.training import formula_rows, tiny_family, train_stage
from job.engines.device import detect
from job.families.gpu_memory import free_gpu_memory
from job.spec.types import JobSpec
from tests.jobs import ROOT
from tests.unit.train.test_capturing import spec_with

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
ON_GPU = ("runtime.accelerator=auto", "train.optim=adamw_torch_fused", "train.max_steps=12")


def trained(
    spec: JobSpec, dtype: torch.dtype, rows: int = 48
) -> tuple[Any, list[float], dict[str, torch.Tensor]]:
    """The result, the losses by step, and the trained weights."""
    family, accelerator = tiny_family(spec), detect(spec.runtime)
    model = family.initialize(seed=0, dtype=dtype, device=accelerator.device)
    result, adapted, history = train_stage(
        spec, accelerator, family, model, list(formula_rows(rows))
    )
    losses = [entry["loss"] for entry in history if "loss" in entry]
    weights = {n: p.detach().cpu() for n, p in adapted.named_parameters() if "lora_" in n}
    return result, losses, weights


def both(
    dtype: torch.dtype, *more: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[float], list[float], Any]:
    _, eager, _ = trained(spec_with(*ON_GPU, "train.cuda_graphs=false", *more), dtype)
    monkeypatch.setattr("job.train.buckets.CAPTURE_TOKENS", 200)  # several buckets
    result, captured, _ = trained(spec_with(*ON_GPU, *more), dtype)
    assert result.captured is not None
    assert result.captured["graphs"] > 1
    assert len(set(eager)) == len(eager) == 12
    return eager, captured, result


def test_losses_in_fp32_equal_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    # In fp32, grouped products are a loop over the experts that waits for the device.
    settings = (
        "model.dtype=float32",
        "model.experts_implementation=batched_mm",
        "lora.finetune_experts=false",
    )
    eager, captured, _ = both(torch.float32, *settings, monkeypatch=monkeypatch)
    assert captured == pytest.approx(eager, abs=1e-5 * max(eager))


@pytest.mark.parametrize(
    "how",
    [(), ("train.torch_compile=true",), ("train.gradient_checkpointing=true",)],
    ids=["eager", "compiled", "recomputed"],
)
@pytest.mark.parametrize("experts", ["false", "true"], ids=["reference targets", "experts too"])
def test_losses_in_bf16_equal_the_eager_ones_within_rounding(
    how: tuple[str, ...], experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("model.dtype=bfloat16", f"lora.finetune_experts={experts}", *how)
    eager, captured, _ = both(torch.bfloat16, *settings, monkeypatch=monkeypatch)
    assert captured == pytest.approx(eager, rel=2e-2)


def test_the_memory_of_graphs_that_are_gone_is_free() -> None:
    device, size = torch.device("cuda"), 2**28
    before, graph = free_gpu_memory(device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(size, dtype=torch.uint8, device=device)
    assert free_gpu_memory(device) <= before - size
    del graph
    assert free_gpu_memory(device) > before - size // 16


CODE = """
import json, sys
import torch
from tests.gpu.test_captured_steps_gpu import ON_GPU, trained
from tests.unit.train.test_capturing import spec_with
result, losses, _ = trained(spec_with(*ON_GPU, *sys.argv[1:]), torch.bfloat16)
print(json.dumps({"captured": result.captured, "losses": losses}))
"""


def test_captures_work_in_a_process_that_does_nothing_before() -> None:
    found = []
    for graphs in ("false", "true"):
        done = subprocess.run(
            [sys.executable, "-c", CODE, f"train.cuda_graphs={graphs}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    eager, captured = found
    assert eager["captured"] is None
    assert captured["captured"]["graphs"] >= 1
    assert captured["losses"] == pytest.approx(eager["losses"], rel=2e-2)
