"""Weights in 4 bits stand for what they unpack to, and nothing keeps them unpacked."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job import engines, families
from job.engines import device as devices
from job.engines.device import Accelerator
from job.errors import SpecError
from job.families.auto import AutoFamily
from job.families.four_bit import FourBit
from job.families.four_bit.packed_weights import packed_names
from job.prep import formulas
from job.prep.images import inspect
from job.prep.rows import Message, Part, Row
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests import models

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make setup EXTRAS=gpu")

from job.families.four_bit.tensor import FourBitTensor, frozen_grouped_mm

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
NF4 = FourBit(quant_type="nf4", double_quant=True)
KINDS = [FourBit(quant_type=t, double_quant=d) for t in ("nf4", "fp4") for d in (True, False)]


@pytest.fixture(scope="module", autouse=True)
def _as_it_is_written() -> Iterator[None]:
    """bitsandbytes compiles what it has no kernel for, on a CPU, with a C++ compiler for half a
    minute, and runs it as it is written if that fails.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    text = Path("specs/latex.yaml").read_text()
    return load_spec(text, "latex", ["model.load_in_4bit=true"], environ={}).spec


@pytest.fixture(scope="module")
def family(spec: JobSpec) -> families.Family:
    return families.bind(families.read_checkpoint("tiny", TINY), spec.model, spec.data)


@pytest.fixture(scope="module")
def plain(spec: JobSpec, family: families.Family) -> dict[str, torch.Tensor]:
    """The weights as they are stored."""
    engine = engines.create(spec.model, spec.lora, CPU)
    return dict(engine.load(family, torch.float32).named_parameters())


def rows_of(spec: JobSpec, family: families.Family) -> Any:
    rows = []
    for number in range(3):
        sample = formulas.sample(spec.data.train[0].formulas, number)
        asked = Message(role="user", parts=(Part(image=0), Part(text="Read.")))
        said = Message(role="assistant", parts=(Part(text=sample.latex),))
        rows.append(Row(id=str(number), messages=(asked, said), images=(inspect(sample.png),)))
    return family.pack([family.encode(row) for row in rows])


def test_linear_layers_and_experts_of_the_language_model_are_packed_and_nothing_else(
    spec: JobSpec, family: families.Family, plain: dict[str, torch.Tensor]
) -> None:
    model = engines.create(spec.model, spec.lora, CPU).load(family)
    packed = {n for n, p in model.named_parameters() if isinstance(p, FourBitTensor)}
    assert packed == {*packed_names(family.meta_model(), NF4)}
    layers = {name for name in packed if name.startswith("model.language_model.layers.")}
    assert packed == layers
    assert any("vision_moe.experts.gate_up_proj" in name for name in layers)
    assert not any(".gate." in name or "norm" in name for name in layers)
    for name, parameter in model.named_parameters():
        assert (parameter.shape, parameter.dtype) == (plain[name].shape, plain[name].dtype)
        if name in packed:
            off = (parameter.unpacked() - plain[name]).norm() / plain[name].norm()
            assert 0.05 < off < 0.15
        else:
            assert torch.equal(parameter, plain[name])
    assert not hasattr(model.config, "quantization_config")


def test_a_module_that_is_trained_in_full_is_not_packed(family: families.Family) -> None:
    skipping = replace(NF4, skip=("0.self_attn.q_proj", "layers.1.mlp"))
    left = packed_names(family.meta_model(), NF4).keys() - packed_names(
        family.meta_model(), skipping
    )
    start = "model.language_model.layers."
    assert f"{start}0.self_attn.q_proj.weight" in left
    assert all(name.startswith((f"{start}0.self_attn.q_proj", f"{start}1.mlp.")) for name in left)


def test_a_weight_that_the_kernels_cannot_count_is_not_packed() -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes = {"hidden_size": 2**14, "moe_intermediate_size": 2**13, "num_experts": 8}
    config = Qwen3MoeConfig(**sizes, num_hidden_layers=1, vocab_size=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.numel() == 2 * experts.down_proj.numel() == 2**31
    found = {name for name in packed_names(model, NF4) if "experts" in name}
    assert found == {"model.layers.0.mlp.experts.down_proj"}


@pytest.mark.parametrize("experts", [False, True])
def test_loss_and_gradients_are_those_of_the_unpacked_weights(
    spec: JobSpec, family: families.Family, experts: bool
) -> None:
    lora = replace(spec.lora, finetune_experts=experts)
    engine, found = engines.create(spec.model, lora, CPU), []
    batch = rows_of(spec, family)
    for packed in (True, False):
        model = engine.load(family)
        for module in model.modules() if not packed else ():
            for name, own in list(module._parameters.items()):
                if isinstance(own, FourBitTensor):
                    module._parameters[name] = torch.nn.Parameter(own.unpacked())
        adapted = engine.attach_adapter(model, family.lora_targets(model, lora), lora, seed=5)
        models.add_noise(adapted, 0.02)
        family.use_packed_step(adapted.get_base_model())
        loss = adapted.train()(**batch, use_cache=False).loss
        loss.backward()
        trained = [p for n, p in adapted.named_parameters() if "lora_" in n]
        found.append((loss.detach(), [p.grad for p in trained if p.grad is not None]))
    (loss, grads), (expected, expected_grads) = found
    assert torch.equal(loss, expected)
    assert len(grads) == len(expected_grads) > 0
    assert all(map(torch.equal, grads, expected_grads))


@pytest.mark.parametrize("product", ["linear", "grouped"])
def test_a_product_keeps_no_unpacked_weight_for_the_backward_pass(product: str) -> None:
    x = torch.randn(6, 128, requires_grad=True)
    if product == "linear":
        weight = FourBitTensor.of(torch.randn(192, 128), NF4)
    else:
        weight = FourBitTensor.of(torch.randn(2, 192, 128), NF4)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if product == "linear":
            out = torch.nn.functional.linear(x, weight)
        else:
            out = frozen_grouped_mm(x, weight, torch.tensor([4, 6], dtype=torch.int32))
    assert sum(kept) < weight.numel() / 10
    unpacked = weight.unpacked()
    matrices = [unpacked] * 6 if product == "linear" else [unpacked[0]] * 4 + [unpacked[1]] * 2
    [grad] = torch.autograd.grad(out.sum(), [x])
    assert torch.allclose(grad, torch.stack([matrix.sum(0) for matrix in matrices]), atol=1e-4)


def mixture(kind: str) -> Any:
    """A tiny mixture of experts of Transformers', in fp32."""
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    if kind == "qwen3_moe":
        few = {"num_experts": 4, "moe_intermediate_size": 32, "intermediate_size": 64}
        made = transformers.Qwen3MoeConfig(**sizes, **heads, **few)
    else:  # its experts are stored transposed, and have biases
        few = {"num_local_experts": 4, "intermediate_size": 64}
        made = transformers.GptOssConfig(**sizes, **heads, **few)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(made)
    for name, own in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(own)
    return model


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_of_other_families_are_not_kept_unpacked_for_the_backward_pass(
    kind: str, spec: JobSpec, family: families.Family
) -> None:
    packed, plain = mixture(kind), mixture(kind)
    names = [name for name in packed_names(plain, NF4) if ".experts." in name]
    for name in names:
        path, _, own = name.rpartition(".")
        weight = FourBitTensor.of(plain.get_parameter(name), NF4)
        packed.get_submodule(path)._parameters[own] = torch.nn.Parameter(
            weight, requires_grad=False
        )
        plain.get_parameter(name).data = weight.unpacked()
    engine = engines.create(spec.model, spec.lora, CPU)
    other: Any = AutoFamily
    embedded = torch.randn(2, 7, 64)
    kept, found = [], []
    for model in (packed, plain):
        engine.prepare(model, other)
        experts = list[torch.Size]()

        def keep(tensor: torch.Tensor, experts: list[torch.Size] = experts) -> torch.Tensor:
            if tensor.ndim == 3 and len(tensor) == 4:  # (experts, …)
                experts.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = embedded.clone().requires_grad_()
            logits = model(inputs_embeds=x, use_cache=False).logits
        [gradient] = torch.autograd.grad(logits.square().sum(), [x])
        found.append((logits.detach(), gradient))
        kept.append(len(experts))
    assert kept == [0, len(names)] == [0, 2]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(96, 400), (4, 96, 400), (64, 32), (192, 100), (5, 7), (3, 6)])
def test_a_weight_of_any_shape_is_unpacked_with_its_own_scales(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also if blocks span rows."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for kind in KINDS:
        unpacked = FourBitTensor.of(weight, kind).unpacked()
        assert unpacked.shape == weight.shape
        off = float((unpacked - weight).norm() / weight.norm())
        assert off < 0.15  # fp4's own rounding is 0.12; with other blocks' scales it is 0.2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_expert_is_unpacked_as_with_all(kind: FourBit) -> None:
    weight = FourBitTensor.of(torch.randn(5, 24, 64), kind)
    for number in (0, 3, -1, torch.tensor(2)):
        one = weight[number]
        assert isinstance(one, FourBitTensor)
        assert torch.equal(one.unpacked(), weight.unpacked()[number])
    large = FourBitTensor.of(torch.randn(4, 96, 200 * 2), kind)  # 600 scales an expert
    for number in range(4):
        one = large[number]
        assert isinstance(one, FourBitTensor)
        assert torch.equal(one.unpacked(), large.unpacked()[number])
        kept = one.state.absmax.untyped_storage().nbytes()
        assert kept == (600 if kind.double_quant else 4 * 600) * 4  # not all scales in fp32
    odd = FourBitTensor.of(torch.randn(3, 5, 7), kind)  # blocks span experts
    assert torch.equal(odd[1], odd.unpacked()[1])
    assert weight.codes.nbytes + 5 * 24 * 64 // 64 * (1 if kind.double_quant else 4) <= (
        kind.packed_bytes(weight.numel())
    )


def test_a_packed_weight_is_never_changed_in_silence() -> None:
    weight = torch.nn.Parameter(FourBitTensor.of(torch.randn(8, 64), NF4), requires_grad=False)
    assert isinstance(weight, FourBitTensor)
    with pytest.raises(RuntimeError, match="cannot be changed"):
        weight.zero_()


@pytest.mark.parametrize("layout", ["vllm", "transformers"])
def test_weights_are_read_one_by_one_as_the_loader_reads_them(
    family: families.Family,
    plain: dict[str, torch.Tensor],
    spec: JobSpec,
    layout: Any,
    tmp_path: Path,
) -> None:
    from job.families.weight_files import Weights

    model = engines.create(spec.model, spec.lora, CPU).load(family, torch.float32)
    weights = Weights.of(model.named_parameters())
    family.save(model, weights, tmp_path, dtype=torch.float32, max_shard_size="4MB", layout=layout)
    bound = families.bind(families.read_checkpoint("copy", tmp_path), spec.model, spec.data)
    with bound.stored_weights() as stored:
        for name in reversed(plain):  # in any order
            assert torch.equal(stored.read(name, torch.float32, CPU.device), plain[name]), name


@pytest.mark.parametrize("write", [models.llama, models.qwen_vl])
def test_other_families_are_packed_and_read_again_too(
    write: Any, spec: JobSpec, tmp_path: Path
) -> None:
    write(tmp_path)
    bound = families.bind(families.read_checkpoint("other", tmp_path), spec.model, spec.data)
    engine = engines.create(spec.model, spec.lora, CPU)
    original = dict(engine.load(bound, torch.float32).named_parameters())
    packed = engine.load(bound)
    names = {n for n, p in packed.named_parameters() if isinstance(p, FourBitTensor)}
    assert names == {*packed_names(bound.meta_model(), NF4)} > set()
    assert not any("visual" in name or "lm_head" in name for name in names)
    with bound.stored_weights() as stored:
        for name, weight in original.items():
            assert torch.equal(stored.read(name, torch.float32, CPU.device), weight), name
    tokens = torch.arange(1, 9)[None]
    assert torch.isfinite(packed(input_ids=tokens).logits).all()


def test_without_bitsandbytes_the_spec_is_refused_with_the_way_to_install_it(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_has_bitsandbytes", lambda: False)
    with pytest.raises(SpecError, match="make setup EXTRAS=gpu"):
        engines.create(spec.model, spec.lora, CPU)


def test_a_device_on_which_packed_weights_are_wrong_is_refused_with_the_reason(
    spec: JobSpec,
) -> None:
    with pytest.raises(SpecError, match=r"does not work on this device: off by 0\.7"):
        devices.require_four_bit(spec.model, "off by 0.7")
    devices.require_four_bit(spec.model)
