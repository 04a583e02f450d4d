"""LoRA targets by name: what is trained, what the merge makes of it, and what vLLM can serve."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from job import engines, families
from job.engines.device import Accelerator
from job.errors import SpecError
from job.export.merge import Merge
from job.families.ernie45_vl.lora_targets import serving
from job.families.lora.gate_up import untrained_zeros
from job.families.lora.parameter_counts import adapter_parameters
from job.families.lora.patterns import require_matches
from job.planning import patterns
from job.planning.sizes import measure
from job.spec.load import load_spec
from job.spec.types import JobSpec

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)

# Each kind of target alone.
OFF: dict[str, Any] = {
    "finetune_vision_layers": False,
    "finetune_language_layers": False,
    "finetune_attention_modules": False,
    "finetune_mlp_modules": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "language attention": {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "language mlp": {
        "target_modules": ("gate_proj", "up_proj", "down_proj"),
        "finetune_experts": False,
    },
    "vision mlp": {"target_modules": r".*vision_tower.*\.fc[12]"},
    "vision attention": {"target_modules": ("qkv", "attn.proj")},
    "resampler": {"target_modules": r".*resampler_model\.(spatial|temporal)_linear\.fc[12]"},
    "other modules": {"target_modules": ("resampler_model.mlp",)},
    "routed experts": {**OFF, "finetune_experts": True},
}
NINE = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
    *("fc1", "fc2"),
)
"""The tutorial's target modules."""
SERVED = {"finetune_vision_layers": False, "finetune_mlp_modules": False}
"""Language attention alone."""


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec


@pytest.fixture(scope="module")
def family(spec: JobSpec) -> families.Family:
    return families.bind(families.read_checkpoint("tiny", TINY), spec.model, spec.data)


Adapt = Callable[..., Any]


@pytest.fixture(scope="module")
def adapt(spec: JobSpec, family: families.Family) -> Adapt:
    """A model with an adapter that says something, as if it had been trained."""
    engine = engines.create(spec.model, spec.lora, CPU)
    base = engine.initialize(family, 5)

    def adapted(**lora: Any) -> Any:
        settings = replace(spec.lora, **lora)
        model = copy.deepcopy(base)
        model = engine.attach_adapter(model, family.lora_targets(model, settings), settings, 5)
        generator = torch.Generator().manual_seed(9)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.05, generator=generator)
        return model.eval()

    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_merged_tensor_by_tensor_as_base_plus_scaled_product(
    adapt: Adapt, family: families.Family, spec: JobSpec, kind: str
) -> None:
    model = adapt(**KINDS[kind])
    targets = family.lora_targets(family.meta_model(), replace(spec.lora, **KINDS[kind]))
    assert list(targets.counts) == [kind]
    base = {
        re.sub(r"\.base_layer", "", name): parameter.detach().clone()
        for name, parameter in model.get_base_model().named_parameters()
        if ".lora_" not in name
    }
    merged = dict(Merge(model, dtype=torch.float32, keeps_fp32=family.keeps_fp32).tensors())
    expected = dict(base)
    scaling = spec.lora.lora_alpha / spec.lora.r
    pairs = _pairs(model)
    assert len(pairs) == targets.counts[kind]
    for name, (a, b) in pairs.items():
        expected[name] = base[name] + scaling * _product(a, b, base[name])
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        if name in pairs:
            assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-7), name
            assert float((tensor - base[name]).abs().max()) > 1e-3, name
        else:
            assert torch.equal(tensor, base[name]), name
    # PEFT's own merge says the same.
    theirs = dict(model.merge_and_unload().named_parameters())
    assert all(torch.allclose(merged[name], theirs[name], atol=1e-6) for name in merged)


def _pairs(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each adapted tensor, by the tensor's name, as PEFT stores them."""
    from peft import get_peft_model_state_dict

    stored = get_peft_model_state_dict(model)
    modules = dict(model.get_base_model().named_modules())
    found = {}
    for name, a in stored.items():
        if not name.endswith("lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        module = stem.removeprefix("base_model.model.")
        parameter = getattr(modules[module], "parameter_name", "weight")
        tensor = f"{re.sub(r'.base_layer', '', module)}.{parameter}"
        found[tensor] = (a.float(), stored[f"{stem}.lora_B.weight"].float())
    return found


def _product(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """B·A, for a fused parameter expert by expert: A holds them in rows, B interleaved."""
    if weight.ndim == 2:
        return b @ a
    experts = weight.shape[0]
    of_each = zip(a.chunk(experts), (b[:, n::experts] for n in range(experts)), strict=True)
    return torch.stack([b_of_one @ a_of_one for a_of_one, b_of_one in of_each])


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_what_peft_trains(
    adapt: Adapt, family: families.Family, spec: JobSpec, kind: str
) -> None:
    [group] = family.lora_targets(family.meta_model(), replace(spec.lora, **KINDS[kind])).groups
    model = adapt(**KINDS[kind])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained -= untrained_zeros(model)
    assert adapter_parameters(family.meta_model(), group, spec.lora) == trained


def test_names_that_differ_in_a_number_are_one_line() -> None:
    names = [f"layers.{n}.self_attn.q_proj" for n in (0, 1, 2, 5)] + ["lm_head"]
    assert patterns(names) == ["layers.0-2,5.self_attn.q_proj", "lm_head"]


# --- routed experts by the names of a published checkpoint ---------------------------------


def test_the_tutorial_s_names_reach_every_routed_expert(
    family: families.Family, spec: JobSpec
) -> None:
    skeleton = family.meta_model()
    named = family.lora_targets(skeleton, replace(spec.lora, target_modules=NINE))
    toggled = family.lora_targets(skeleton, replace(spec.lora, finetune_experts=True))
    assert (named.counts, named.gate_up) == (toggled.counts, toggled.gate_up)
    assert {*named.modules} == {*toggled.modules}
    assert named.parameters == toggled.parameters
    assert len(named.gate_up) == 5  # text and vision experts of 3 layers, but for the last's vision
    light = replace(spec.lora, target_modules=NINE, finetune_experts=False)
    assert not family.lora_targets(skeleton, light).parameters


def test_the_published_model_trains_the_tutorial_s_weights_that_get_a_gradient() -> None:
    loaded = load_spec(
        Path("specs/ernie-4.5-vl-28b-latex.yaml").read_text(), "x", environ={"BUCKET": "b"}
    )
    text = families.architecture(loaded.spec.model)[1].config.text_config
    hidden, layers = text.hidden_size, text.mlp_layer_types.count("sparse")
    # gate, up and down of each expert are modules of their own in the tutorial, of rank 8
    of_one = {inner: 8 * 3 * (hidden + inner) for inner in text.moe_intermediate_size}
    tutorial = 11_321_344 + text.moe_num_experts * layers * sum(of_one.values())
    assert tutorial == 308_592_640
    untouched = text.moe_num_experts * of_one[text.moe_intermediate_size[1]]  # the last layer's
    assert measure(loaded.spec).trainable == tutorial - untouched == 303_874_048
    # Its code names the resampler's layers 0 and 2, which fc1 and fc2 do not reach.
    own = tuple(f"mlp.{name}" if name.startswith("fc") else name for name in NINE)
    lora = replace(loaded.spec.lora, target_modules=own, finetune_experts=None)
    without = measure(replace(loaded.spec, lora=lora)).trainable + untouched
    assert (without, tutorial - without) == (308_224_000, 368_640)
    lora = replace(
        loaded.spec.lora, target_modules=(*NINE, "qkv", "attn.proj"), finetune_experts=None
    )
    assert measure(replace(loaded.spec, lora=lora)).trainable - 303_874_048 == 1_966_080


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("up_proj",)}, r"selects a part of .*text_moe.experts.gate_up_proj"),
        ({"target_modules": r".*(experts\.[01]\.|mlp\.)down_proj"}, r"not .*experts\.2\.down_proj"),
        ({"target_modules": NINE, "lora_dropout": 0.1}, "reaches routed experts"),
        ({"target_modules": ".*_proj", "use_dora": True}, "reaches routed experts"),
        ({"target_modules": NINE, "rank_pattern": (("up_proj", 2),)}, "gives up_proj 2, but"),
    ],
)
def test_what_fused_experts_cannot_do_is_refused_with_a_fix_that_is_right(
    family: families.Family, spec: JobSpec, settings: dict[str, Any], message: str
) -> None:
    skeleton = family.meta_model()
    with pytest.raises(SpecError, match=message) as refused:
        family.lora_targets(skeleton, replace(spec.lora, **settings))
    [problem] = refused.value.problems
    if "finetune_experts: false" in str(problem.fix):
        family.lora_targets(skeleton, replace(spec.lora, **settings, finetune_experts=False))
    else:
        assert str(problem.fix).startswith("put gate_up_proj: 2 first")
        pattern = (("gate_up_proj", 2), *settings["rank_pattern"])
        family.lora_targets(skeleton, replace(spec.lora, **settings | {"rank_pattern": pattern}))


# --- serving -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_language_attention_alone_is_servable_as_an_adapter(spec: JobSpec, kind: str) -> None:
    found = serving(replace(spec.lora, **KINDS[kind]))
    if kind == "language attention":
        assert (found.servable, found.merged_only) == ((kind,), ())
    else:
        assert (found.servable, found.merged_only) == ((), (kind,))
        assert f"merged/ only; of an adapter vLLM does not serve {kind}" in str(found)


@pytest.mark.parametrize(
    ("settings", "merged_only"),
    [
        ({}, ("language mlp", "vision mlp", "resampler")),
        (SERVED, ()),
        (SERVED | {"use_dora": True}, ("DoRA",)),
        (SERVED | {"bias": "lora_only"}, ("trained biases",)),
        (SERVED | {"use_rslora": True}, ()),
        ({"finetune_mlp_modules": False}, ("vision attention",)),
        ({"target_modules": ("q_proj", "fc1")}, ("vision mlp", "resampler")),
        ({"target_modules": ("down_proj",)}, ("language mlp", "routed experts")),
        ({"target_modules": ("q_proj",), "finetune_experts": True}, ("routed experts",)),
        ({"target_modules": r".*layers\.[0-9]\.self_attn\.q_proj"}, ()),
        (
            {"target_modules": ("q_proj",), "target_parameters": ("experts.down_proj",)},
            ("routed experts",),
        ),
    ],
)
def test_what_is_served_merged_only_is_known_from_the_spec(
    spec: JobSpec, settings: dict[str, Any], merged_only: tuple[str, ...]
) -> None:
    assert serving(replace(spec.lora, **settings)).merged_only == merged_only


def test_the_spec_tells_the_kinds_that_the_model_has(
    family: families.Family, spec: JobSpec
) -> None:
    skeleton = family.meta_model()
    for settings in (
        {},
        *KINDS.values(),
        {"target_modules": ".*"},
        {"target_modules": "all-linear"},
        {"target_modules": NINE},
        {"target_modules": ("shared_experts.down_proj",)},
        {"target_modules": r".*text_moe\.experts\.\d+\.down_proj"},
    ):
        lora = replace(spec.lora, **settings)
        told = serving(lora)
        resolved = family.lora_targets(skeleton, lora).counts
        assert {*told.servable, *told.merged_only} == set(resolved), settings


def test_a_served_adapter_is_the_same_under_the_published_names(
    adapt: Adapt, family: families.Family, tmp_path: Path
) -> None:
    model = adapt(**SERVED)
    model.save_pretrained(tmp_path / "adapter")
    family.write_served_adapter(tmp_path / "adapter", tmp_path / "adapter-vllm")
    ours = safetensors.torch.load_file(tmp_path / "adapter/adapter_model.safetensors")
    served = safetensors.torch.load_file(tmp_path / "adapter-vllm/adapter_model.safetensors")
    assert len(served) == len(ours) == 4 * 4 * 2  # layers, projections, A and B
    for name, tensor in ours.items():
        assert torch.equal(served[name.replace("model.language_model.", "model.")], tensor)
    wanted = r"base_model\.model\.model\.layers\.\d\.self_attn\.[qkvo]_proj\.lora_[AB]\.weight"
    assert all(re.fullmatch(wanted, name) for name in served)
    config = json.loads((tmp_path / "adapter-vllm/adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("pattern", "fix"),
    [
        ("q_pro", "write q_proj"),
        ("lm_head", "remove it: lora.modules_to_save trains lm_head in full"),
        ("experts", "names of adapted modules: k_proj, q_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_with_a_way_out(
    spec: JobSpec, pattern: str, fix: str
) -> None:
    lora = replace(spec.lora, rank_pattern=((pattern, 4),), modules_to_save=("lm_head",))
    with pytest.raises(SpecError, match="matches no adapted module") as refused:
        require_matches(lora, ["layers.0.q_proj", "layers.0.k_proj"])
    assert refused.value.problems[0].fix == fix
