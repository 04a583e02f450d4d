"""Gate and up of routed experts, each with an adapter of its own, as modules have."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import linear

from job import engines, families
from job.engines.device import Accelerator
from job.engines.lora_config import lora_config
from job.families.base import SORTED_EXPERTS
from job.families.lora.gate_up import (
    GateUpWrapper,
    has_blocks,
    train_blocks,
    wrapped_parameters,
    zero_outside_blocks,
)
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests.unit.families.test_packed_step import BATCHES, near, step

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    sets = ["lora={r: 3, lora_alpha: 6, finetune_experts: true}"]
    return load_spec(Path("specs/latex.yaml").read_text(), "x", sets, environ={}).spec


@pytest.fixture(scope="module")
def family(spec: JobSpec) -> families.Family:
    return families.bind(families.read_checkpoint("tiny", TINY), spec.model, spec.data)


def adapted(spec: JobSpec, family: families.Family, *, packed: bool) -> Any:
    engine = engines.create(spec.model, spec.lora, CPU)
    model = engine.initialize(family, 5)
    if packed:
        family.use_packed_step(model)
        family.set_experts_implementation(model, SORTED_EXPERTS)
    model = engine.attach_adapter(model, family.lora_targets(model, spec.lora), spec.lora, 5)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    for wrapper in gate_ups(model):
        zero_outside_blocks(wrapper.lora_B["default"].weight.data)
    return model.train()


def gate_ups(model: Any) -> list[GateUpWrapper]:
    return [module for module in model.modules() if isinstance(module, GateUpWrapper)]


def test_the_packed_and_the_padded_step_train_the_blocks_as_peft_does(
    spec: JobSpec, family: families.Family
) -> None:
    rows = [family.encode(each) for each in BATCHES["mixed images"]]
    padded = adapted(spec, family, packed=False)
    expected, grads = step(padded, family.collate(rows))
    loss, packed_grads = step(adapted(spec, family, packed=True), family.pack(rows))
    near(loss, expected, "loss")
    for name, grad in packed_grads.items():
        near(grad, grads[name], name)
    # PEFT's own wrapper, in the same place.
    for wrapper in gate_ups(padded):
        wrapper.__class__ = GateUpWrapper.__base__
    padded.zero_grad()
    _, dense = step(padded, family.collate(rows))
    outside = 0
    for name, wrapper in wrapped_parameters(padded):
        if not name.endswith("gate_up_proj"):
            continue
        stored = next(n for n, p in padded.named_parameters() if p is wrapper.lora_B.default.weight)
        outside += not has_blocks(dense[stored])
        zero_outside_blocks(dense[stored])
        near(grads[stored], dense[stored], stored)
        assert has_blocks(packed_grads[stored])
    assert outside == 5
    assert grads.keys() == dense.keys()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_is_that_of_an_adapter_for_each_and_keeps_the_zeros(optimizer: Any) -> None:
    r, inner, inputs = 3, 4, 5
    generator = torch.Generator().manual_seed(1)
    apart = [
        (torch.randn(r, inputs, generator=generator), torch.randn(inner, r, generator=generator))
        for _ in ("gate", "up")
    ]
    a = torch.cat([a for a, _ in apart])
    b = torch.block_diag(*(b for _, b in apart))
    x, y = torch.randn(7, inputs, generator=generator), torch.randn(7, 2 * inner)
    trained: list[list[torch.Tensor]] = [[a, b], [each.clone() for pair in apart for each in pair]]
    for parameters in trained:
        for parameter in parameters:
            parameter.requires_grad_()
        steps = optimizer(parameters, lr=0.1, weight_decay=0.1)
        for _ in range(5):
            if len(parameters) == 2:
                out = linear(linear(x, parameters[0]), train_blocks(parameters[1]))
            else:
                a_gate, b_gate, a_up, b_up = parameters
                gate, up = linear(linear(x, a_gate), b_gate), linear(linear(x, a_up), b_up)
                out = torch.cat([gate, up], dim=1)
            steps.zero_grad()
            (out - y).square().mean().backward()
            steps.step()
    a_gate, b_gate, a_up, b_up = trained[1]
    near(a, torch.cat([a_gate, a_up]), "A")
    near(b, torch.block_diag(b_gate, b_up), "B")
    assert has_blocks(b.detach())
    assert not torch.allclose(b_gate, apart[0][1], atol=0.1)


def test_a_training_goes_on_from_what_is_stored_to_the_same_adapter(
    spec: JobSpec, family: families.Family
) -> None:
    batch = family.pack([family.encode(each) for each in BATCHES["equal images"]])
    whole, resumed = adapted(spec, family, packed=True), None
    optimizer = optimizer_of(whole)
    for number in range(4):
        if number == 2:
            resumed = adapted(spec, family, packed=True)
            set_peft_model_state_dict(resumed, copy.deepcopy(get_peft_model_state_dict(whole)))
            going_on = optimizer_of(resumed)
            going_on.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for model, steps in ((whole, optimizer), *([(resumed, going_on)] if resumed else [])):
            steps.zero_grad()
            step(model, batch)
            steps.step()
    stored, again = (get_peft_model_state_dict(model) for model in (whole, resumed))
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    for wrapper in gate_ups(whole):
        assert has_blocks(wrapper.lora_B["default"].weight)


def optimizer_of(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("rslora", [False, True])
def test_plain_peft_reads_the_adapter_and_computes_the_same(
    spec: JobSpec, family: families.Family, tmp_path: Path, rslora: bool
) -> None:
    spec = replace(spec, lora=replace(spec.lora, use_rslora=rslora))
    model = adapted(spec, family, packed=False).eval()
    scalings = {round(wrapper.scaling["default"], 9) for _, wrapper in wrapped_parameters(model)}
    assert scalings == {2.0 if not rslora else round(6 / 3**0.5, 9)}
    model.save_pretrained(tmp_path)
    base = engines.create(spec.model, spec.lora, CPU).initialize(family, 5)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    assert not gate_ups(theirs)
    batch = family.collate([family.encode(each) for each in BATCHES["one row"]])
    with torch.no_grad():
        near(model(**batch).logits, theirs(**batch).logits, "logits")


def test_the_stored_adapter_loads_beside_the_trained_one_and_computes_the_same(
    spec: JobSpec, family: families.Family, tmp_path: Path
) -> None:
    model = adapted(spec, family, packed=False).eval()
    model.save_pretrained(tmp_path)
    loaded = model.load_adapter(tmp_path, adapter_name="reloaded", is_trainable=False)
    assert not loaded.unexpected_keys
    batch = family.collate([family.encode(each) for each in BATCHES["one row"]])
    with torch.no_grad():
        expected = model(**batch).logits
        model.set_adapter("reloaded")
        assert torch.equal(model(**batch).logits, expected)


def test_the_merge_is_bit_for_bit_peft_s_in_the_exported_dtype(
    spec: JobSpec, family: families.Family
) -> None:
    from job.export.merge import Merge

    model = adapted(spec, family, packed=False).eval()
    ours = dict(Merge(model, dtype=torch.float16, keeps_fp32=family.keeps_fp32).tensors())
    theirs = dict(model.merge_and_unload().named_parameters())
    for name in (n for n in ours if "experts." in n):
        assert torch.equal(ours[name], theirs[name].half()), name


def test_a_rank_pattern_gives_each_of_gate_and_up_its_rank(
    spec: JobSpec, family: families.Family
) -> None:
    patterns = ((r"layers\.1\..*text_moe.*gate_up_proj", 2), ("experts.down_proj", 1))
    spec = replace(spec, lora=replace(spec.lora, rank_pattern=patterns))
    model = adapted(spec, family, packed=True)
    ranks = {name: wrapper.r["default"] for name, wrapper in wrapped_parameters(model)}
    special = "model.language_model.layers.1.mlp.text_moe.experts.gate_up_proj"
    assert ranks.pop(special) == 4
    assert {r for n, r in ranks.items() if n.endswith("gate_up_proj")} == {6}
    assert {r for n, r in ranks.items() if n.endswith("down_proj")} == {1}
    targets = family.lora_targets(family.meta_model(), spec.lora)
    assert lora_config(targets, spec.lora).alpha_pattern == {r"experts\.gate_up_proj": 12}


def test_a_new_adapter_starts_with_the_distribution_of_single_modules(
    spec: JobSpec, family: families.Family
) -> None:
    engine = engines.create(spec.model, spec.lora, CPU)
    model = engine.initialize(family, 5)
    model = engine.attach_adapter(model, family.lora_targets(model, spec.lora), spec.lora, 5)
    state = get_peft_model_state_dict(model)
    for wrapper in gate_ups(model):
        a, b = (each["default"].weight.detach() for each in (wrapper.lora_A, wrapper.lora_B))
        bound = a.shape[1] ** -0.5  # of Kaiming's uniform with a = sqrt(5)
        assert 0.95 * bound < float(a.abs().max()) <= bound
        assert not b.any()
    assert len(state) == 2 * (16 + 12 + 8 + 4 + 10)
