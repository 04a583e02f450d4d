"""Passes that fit into a GPU's memory, and blocks that are compiled only where that pays."""

from dataclasses import replace

import pytest
import torch

from job.engines.device import detect, release_memory
from job.spec.types import JobSpec
from tests.gpu.test_captured_steps_gpu import ON_GPU, trained
from tests.unit.train.test_capturing import spec_with

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def spec(**train: object) -> JobSpec:
    given = spec_with(*ON_GPU, "train.router_aux_loss_coef=0")
    changed = {"gradient_checkpointing": "auto", "torch_compile": "auto", **train}
    return replace(given, train=replace(given.train, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "captured"])
def test_a_step_is_one_pass_with_its_activations_kept_and_a_short_training_is_not_compiled(
    graphs: bool,
) -> None:
    result, losses, _ = trained(spec(cuda_graphs=graphs), torch.float32)
    how = result.computing
    assert (how["rows_a_pass"], how["passes_a_step"]) == (4, 1)
    assert not how["gradient_checkpointing"]
    assert not how["torch_compile"]
    assert "12 steps would save" in how["torch_compile_reason"]
    written = spec(cuda_graphs=False, fit="off", gradient_checkpointing=True)
    _, divided, _ = trained(written, torch.float32)
    assert losses == pytest.approx(divided, rel=1e-3)


def test_what_does_not_fit_is_recomputed_or_divided() -> None:
    """All but little of the GPU's memory is taken, so that a large step does not fit in one."""
    device = detect(spec().runtime).device
    large = spec(per_device_train_batch_size=512, gradient_accumulation_steps=1, max_steps=2)
    free, _ = torch.cuda.mem_get_info(device)
    taken = torch.empty(free - 3 * 2**30, dtype=torch.uint8, device=device)
    try:
        result, losses, _ = trained(large, torch.float32, rows=512)
    finally:
        del taken
        release_memory()
    how = result.computing
    assert how["rows_a_pass"] * how["passes_a_step"] == 512
    assert how["gradient_checkpointing"] or how["passes_a_step"] > 1
    assert result.fit["too_large"]
    assert all(loss > 0 for loss in losses)


def test_a_training_compiled_by_choice_has_the_losses_of_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("job.train.compile_choice.COMPILE_SECONDS", 0)
    result, compiled, _ = trained(spec(), torch.bfloat16)
    _, plain, _ = trained(spec(torch_compile=False), torch.bfloat16)
    assert result.computing["torch_compile"]
    assert compiled == pytest.approx(plain, rel=0.02)
