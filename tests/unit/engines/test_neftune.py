"""NEFTune: Transformers' noise, with each row's own length, in training alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from job import families
from job.engines.neftune import noisy_embeddings
from job.families.ernie45_vl import Ernie45VL
from job.families.ernie45_vl.packed.batch import pack
from tests.models import BUILDERS
from tests.unit.families.test_packed_step import adapted, image, near, row, step
from tests.unit.families.test_packed_step import family as family
from tests.unit.families.test_packed_step import plain as plain

ALPHA = 5.0


def embedded(model: Any, batch: Any) -> torch.Tensor:
    """What the model's first layer gets: the embeddings after images are put in."""
    found: list[torch.Tensor] = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1
                  and "DecoderLayer" in type(m[0]).__name__)  # fmt: skip

    def note(_: Any, args: Any, kwargs: Any) -> None:
        found.append((args or [kwargs["hidden_states"]])[0].detach().clone())

    hook = layers[0].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
    hook.remove()
    return found[0]


def test_the_noise_of_equally_long_rows_is_that_of_transformers(tmp_path: Path) -> None:
    BUILDERS["llama"](tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    ids = torch.arange(24).reshape(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    hook = activate_neftune(model, ALPHA)
    torch.manual_seed(1)
    theirs = model(**batch).loss
    deactivate_neftune(model, hook)
    with noisy_embeddings(model, ALPHA):
        torch.manual_seed(1)
        ours = model(**batch).loss
    torch.testing.assert_close(ours, theirs)
    assert ours != model(**batch).loss, "and none afterwards"


@pytest.fixture
def rows(family: Ernie45VL) -> list[Any]:
    return [family.encode(each) for each in (row("x" * 40, image(112, 56)), row("a+b"))]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_each_row_has_noise_by_its_own_length_and_images_have_none(
    family: Ernie45VL, plain: Any, rows: list[Any], packed: bool
) -> None:
    model = adapted(plain, packed=packed, experts=False)
    batch: Any = pack(rows, family.processor) if packed else family.collate(rows)
    clean = embedded(model, batch)
    with noisy_embeddings(model, ALPHA):
        noise = embedded(model, batch) - clean
    lengths = [len(each.input_ids) for each in rows]
    own = noise.split(lengths) if packed else [n[:t] for n, t in zip(noise, lengths, strict=True)]
    for each, encoded in zip(own, rows, strict=True):
        limit = ALPHA / (each.numel() ** 0.5)
        is_image = torch.tensor([t == family.processor.image_token_id for t in encoded.input_ids])
        assert not each[is_image].any()
        largest = float(each[~is_image].abs().max())
        assert 0.98 * limit < largest < 1.001 * limit


def test_evaluation_and_generation_have_no_noise(family: Ernie45VL, plain: Any, rows: Any) -> None:
    model = adapted(plain, packed=True, experts=False).eval()
    batch = family.collate(rows)
    clean = model(**batch, use_cache=False).loss
    state = torch.get_rng_state()
    with noisy_embeddings(model, ALPHA):
        assert torch.equal(model(**batch, use_cache=False).loss, clean)
    assert torch.equal(torch.get_rng_state(), state), "nor are random numbers drawn"


def outcome(plain: Any, batch: Any, *, checkpointing: bool = False, compiled: bool = False) -> Any:
    from job.engines.compiling import compile_blocks

    model = adapted(plain, packed=True, experts=False, checkpointing=checkpointing)
    if compiled:
        compile_blocks(model, backend="eager")
    with noisy_embeddings(model, ALPHA):
        torch.manual_seed(4)
        return step(model, batch)


@pytest.mark.parametrize("how", ["checkpointing", pytest.param("compiled", marks=pytest.mark.slow)])
def test_recomputed_and_compiled_blocks_get_the_same_noise(
    family: Ernie45VL, plain: Any, rows: list[Any], how: str
) -> None:
    batch: Any = pack(rows, family.processor)
    loss, grads = outcome(plain, batch)
    other_loss, other_grads = outcome(plain, batch, **{how: True})
    near(other_loss, loss, "loss")
    for name, grad in grads.items():
        near(other_grads[name], grad, name)


def test_noise_moves_the_loss_of_a_bound_family(family: families.Family, plain: Any) -> None:
    model = adapted(plain, packed=True, experts=False)
    batch: Any = pack([family.encode(row("a"))], family.processor)
    without = model(**batch).loss
    with noisy_embeddings(model, None):
        assert torch.equal(model(**batch).loss, without), "null adds none"
    with noisy_embeddings(model, 100.0):
        assert not torch.equal(model(**batch).loss, without)
