"""With gradient checkpointing, no gradients are computed in frozen parts."""

import json
from typing import Any

import pytest
import torch

from benchmarks.training import SPEC, formula_rows, random_model, tiny_family, train_stage
from job.engines import gradient_checkpointing
from job.engines.device import detect
from job.families.encoded import Encoded
from job.families.ernie45_vl import Ernie45VL
from job.spec.load import load_spec
from job.spec.types import JobSpec

SETTINGS = {
    "lora.finetune_vision_layers": False,
    "train.max_length": 2048,
    "train.gradient_checkpointing": True,
    "train.per_device_train_batch_size": 2,
    "train.gradient_accumulation_steps": 1,
    "train.max_steps": 1,
    "train.fit": "on",
}


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    given = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    return load_spec(SPEC.read_text(), str(SPEC), given, environ={}).spec


def image_features(model: Any, family: Ernie45VL, rows: list[Encoded]) -> torch.Tensor:
    """The vision tower's output for the rows, in a step."""
    seen: list[torch.Tensor] = []
    tower = model.get_base_model().model.vision_tower
    hook = tower.ln.register_forward_hook(lambda *each: seen.append(each[2]))
    model.train()(**family.pack(rows), use_cache=False).loss.backward()
    hook.remove()
    return seen[0]


def test_a_frozen_tower_has_none(spec: JobSpec) -> None:
    accelerator, family = detect(spec.runtime), tiny_family(spec)
    model = random_model("tiny", None, family, accelerator.device)
    rows = list(formula_rows(2))
    _, trained, _ = train_stage(spec, accelerator, family, model, rows)
    encoded = [family.encode(row) for row in rows]
    assert trained.is_gradient_checkpointing
    assert not image_features(trained, family, encoded).requires_grad
    kept = [p.grad.clone() for p in trained.parameters() if p.grad is not None]
    trained.gradient_checkpointing_disable()
    trained.zero_grad()
    image_features(trained, family, encoded)
    made = [p.grad for p in trained.parameters() if p.grad is not None]
    torch.testing.assert_close(kept, made)
    gradient_checkpointing.enable(trained)
    assert not image_features(trained, family, encoded).requires_grad
