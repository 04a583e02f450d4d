"""What training writes, and the model after it."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from job import families
from job.spec.load import load_spec
from job.train.outputs import without_autocast
from tests.jobs import ROOT
from tests.unit.families.test_packed_step import image, row


def test_a_trained_model_has_its_class_s_forward_again() -> None:
    spec = load_spec((ROOT / "specs/latex.yaml").read_text(), "latex.yaml", environ={}).spec
    tiny = ROOT / "job" / "families" / "builtin" / "ernie-vl-tiny"
    family = families.bind(families.read_checkpoint("tiny", tiny), spec.model, spec.data)
    model: Any = family.load(dtype=torch.float32, device=torch.device("cpu"))
    family.use_packed_step(model)
    prompt = family.collate_prompts([family.encode(row("x", image(56, 56)))])
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        trained = accelerator.prepare(model)
        assert "forward" in vars(trained), "autocast is around it"
        done = without_autocast(accelerator.unwrap_model(trained))
    finally:
        AcceleratorState._reset_state(True)
    assert done is model
    assert torch.equal(done.generate(**prompt, max_new_tokens=3, do_sample=False), answer)
