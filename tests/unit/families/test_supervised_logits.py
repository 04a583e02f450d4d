"""The loss from supervised logits equals Transformers', for every model type of the list."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from job import engines, families
from job.engines.device import Accelerator
from job.families.batches import Batch
from job.families.supervised_logits import MODEL_TYPES, supervised_logits_only
from job.spec.load import load_spec
from tests.models import BUILDERS
from tests.unit.families.test_ernie45_vl import row, turn

CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
ROWS = [
    row(turn("user", "1?"), turn("assistant", "one")),
    row(
        turn("user", "Count."), turn("assistant", "1 2"), turn("user", "on"), turn("assistant", "3")
    ),
]


@pytest.fixture(params=list(BUILDERS))
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Batch]:
    """A model with an adapter that does something, and a batch of padded rows."""
    spec = load_spec(Path("specs/latex.yaml").read_text(), "latex.yaml", environ={}).spec
    BUILDERS[request.param](tmp_path / "model")
    checkpoint = families.read_checkpoint(str(tmp_path / "model"), tmp_path / "model")
    family = families.bind(checkpoint, spec.model, spec.data)
    model: Any = engines.create(spec.model, spec.lora, CPU).load(family)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    return adapted, family.collate([family.encode(each) for each in ROWS])


def outcome(model: Any, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor], torch.Size]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return out.loss.detach(), grads, out.logits.shape


def test_loss_and_gradients_are_those_of_transformers(made: tuple[Any, Batch]) -> None:
    model, batch = made
    base = model.get_base_model()
    assert base.config.model_type in MODEL_TYPES
    words = base.get_output_embeddings().out_features
    loss, grads, shape = outcome(model.train(), batch)
    assert shape[-1] == words
    with supervised_logits_only(base) as alone:
        assert alone
        found, own, hidden = outcome(model, batch)
        assert hidden[-1] != words, "no logits are made"
        judged = model.eval()(**batch)
        assert judged.logits.shape[-1] == words
    torch.testing.assert_close(found, loss)
    assert len(own) == len(grads) > 0
    for mine, other in zip(own, grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(judged.loss, loss)
    again, _, shape = outcome(model.train(), batch)
    assert shape[-1] == words
    torch.testing.assert_close(again, loss)


def test_a_head_that_is_trained_is_left_alone(made: tuple[Any, Batch]) -> None:
    model, _ = made
    base = model.get_base_model()
    base.get_output_embeddings().weight.requires_grad_(True)
    with supervised_logits_only(base) as alone:
        assert not alone
