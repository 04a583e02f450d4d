"""Adapters in PEFT's format, made here or elsewhere: read whole, or refused by name."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from job import engines, families, storage
from job.engines.adapter_fit import require_fit
from job.engines.device import Accelerator
from job.engines.lora_config import lora_config
from job.engines.stored_adapter import load_into, read_adapter, with_adapter
from job.errors import InputError, SpecError
from job.families import model_source
from job.families.adapter_source import find_adapter
from job.families.lora.gate_up import GateUpWrapper, zero_outside_blocks
from job.families.lora.parameter_counts import stored_zeros, trained_parameters
from job.spec.load import load_spec
from job.spec.types import JobSpec, LoraSpec
from tests.conftest import S3

CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
PARAMETERS = {"target_parameters": ("experts.gate_up_proj", "experts.down_proj")}
ATTENTION = {"finetune_mlp_modules": False, "finetune_vision_layers": False}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    text = Path("specs/latex.yaml").read_text()
    return load_spec(text, "specs/latex.yaml", ["lora={}"], environ={}).spec


@pytest.fixture
def skeleton(spec: JobSpec) -> Any:
    return families.architecture(spec.model)[1]


Write = Callable[..., Path]


@pytest.fixture
def write(spec: JobSpec, tmp_path: Path) -> Write:
    """Stores an adapter with random values, as this project does; `change` changes its tensors."""

    def stored(change: Callable[[Tensors], Tensors] = dict, **lora: Any) -> Path:
        settings = replace(spec.lora, **lora)
        family, model = families.architecture(spec.model)
        targets = family.lora_targets(model, settings)
        adapted = engines.create(spec.model, settings, CPU).attach_adapter(
            model, targets, settings, 0
        )
        shapes = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        generator = torch.Generator().manual_seed(1)
        tensors = {
            name: torch.rand(each.shape, generator=generator) for name, each in shapes.items()
        }
        for name, module in adapted.named_modules():
            if isinstance(module, GateUpWrapper):
                zero_outside_blocks(tensors[f"{name}.lora_B.weight"])
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        adapted.peft_config["default"].save_pretrained(folder)
        save_file(change(tensors), folder / "adapter_model.safetensors")
        return folder

    return stored


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        named = {}
        for name, tensor in tensors.items():
            for pattern, replacement in pairs:
                name = re.sub(pattern, replacement, name)
            named[name] = tensor
        return named

    return change


NAMES: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "as PEFT writes them": ({"finetune_experts": True}, dict),
    "with the adapter's name": ({}, renamed((r"(lora_[AB])", r"\1.default"))),
    "of a compiled and distributed model": ({}, renamed(("^", "module._orig_mod."))),
    "without PEFT's prefix": (ATTENTION, renamed(("^base_model.model.", ""))),
    "the published ones": (
        {},
        renamed(
            ("model.language_model.", "model."),
            ("model.vision_tower.", "vision_model."),
            (r"_linear\.fc1", "_linear.0"),
            (r"_linear\.fc2", "_linear.2"),
        ),
    ),
    "of Transformers before 4.52": (
        ATTENTION,
        renamed(("model.language_model.", "language_model.model.")),
    ),
    "DoRA's of an older PEFT": (
        {"use_dora": True},
        renamed((r"lora_magnitude_vector$", "lora_magnitude_vector.default.weight")),
    ),
    "of modules in full, as in a state dict": (
        {"modules_to_save": ("embed_tokens",)},
        renamed(
            (r"embed_tokens\.", "embed_tokens.modules_to_save.default."),
            (r"lm_head\.", "lm_head.modules_to_save.default."),
            # Tied: both are one matrix.
        ),
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_the_same_adapter_is_read_under_other_names(
    case: str, write: Write, skeleton: Any, spec: JobSpec
) -> None:
    lora, change = NAMES[case]
    own = load_file(write(**lora) / "adapter_model.safetensors")
    stored = read_adapter("x", write(change, **lora), skeleton)
    assert {*stored.renamed.values()} == {*own}
    require_fit(
        stored,
        replace(spec.lora, **lora),
        partial(families.architecture(spec.model)[0].lora_targets, skeleton),
    )


def without(ending: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(ending)}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, f"base_model.model.{name}": torch.zeros(shape)}


LAYER = "model.language_model.layers.0.self_attn"
DAMAGED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a missing tensor": (
        without("layers.0.self_attn.q_proj.lora_B.weight"),
        f"1 are missing: {LAYER}.q_proj.lora_B.weight",
    ),
    "a module of another model": (
        added("model.layers.0.attn.c_attn.lora_A.weight", 8, 4),
        "adapts 1 modules that the model does not have: model.layers.0.attn.c_attn",
    ),
    "single experts": (
        added("model.language_model.layers.1.mlp.experts.3.up_proj.lora_A.weight", 8, 4),
        "it adapts single experts, which this model computes together",
    ),
    "another width": (
        lambda tensors: {
            n: t[:, :8].contiguous() if "q_proj.lora_A" in n else t for n, t in tensors.items()
        },
        "have another shape than this model needs: model.language_model.layers.0.self_attn.q_proj",
    ),
    "an adapted embedding": (
        added("model.language_model.embed_tokens.lora_embedding_A", 8, 4),
        "has tensors of a kind that this version does not train",
    ),
    "a tensor twice": (
        added(f"base_model.model.{LAYER}.q_proj.lora_A.weight", 8, 256),
        "has 1 tensors under several names",
    ),
    "nothing but a head": (
        lambda _: {"base_model.model.lm_head.weight": torch.zeros(512, 256)},
        "has no LoRA tensors",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_tensor_that_does_not_fit_is_named_and_none_is_ignored(
    case: str, write: Write, skeleton: Any
) -> None:
    change, message = DAMAGED[case]
    with pytest.raises(InputError) as refused:
        read_adapter("s3://b/adapter", write(change), skeleton)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "is an adapter of the kind IA3, not LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
        ({"lora_bias": True}, "sets lora_bias, which this version does not support"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"r": "eight"}, "has a setting of the wrong type: 'eight' is not a whole number"),
        ({"bias": "some"}, "its bias is 'some'"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    settings: dict[str, Any], message: str, write: Write, skeleton: Any
) -> None:
    folder = write()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(InputError, match=re.escape(message)):
        read_adapter("s3://b/adapter", folder, skeleton)


def test_a_pickled_adapter_is_refused_before_it_is_read(write: Write) -> None:
    folder = write()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="a pickle, which can run code") as refused:
        find_adapter(str(folder))
    assert "save_pretrained" in str(refused.value)


def test_an_adapter_in_a_store_is_read_through_the_cache_and_denied_access_is_one_error(
    write: Write, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write()
    storage.upload_tree(folder, s3.uri("adapter"))
    found = find_adapter(s3.uri("adapter"))
    fetched = model_source.fetch_model(found, tmp_path / "cache")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (fetched / name).read_bytes() == (folder / name).read_bytes()
    storage.delete(s3.uri("adapter/adapter_config.json"))
    with pytest.raises(InputError, match=r"adapter_config.json is missing"):
        find_adapter(s3.uri("adapter"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError) as denied:
        find_adapter(s3.uri("adapter"))
    assert denied.value.exit_code == 12


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the adapter's, and the spec's
    "rank": ({"r": 4, "lora_alpha": 8}, {}),
    "scaling": ({"lora_alpha": 32}, {}),
    "DoRA, rsLoRA and modules": ({**ATTENTION, "use_dora": True, "use_rslora": True}, {}),
    "no experts": ({}, {"finetune_experts": True, "finetune_vision_layers": False}),
    "no experts, by names": ({}, {"target_modules": ("gate_proj", "up_proj", "down_proj")}),
    "experts' own gate and up": ({"finetune_experts": True, "use_rslora": True}, PARAMETERS),
    "one adapter for gate and up": (
        {**PARAMETERS, "rank_pattern": (("gate_up_proj", 16),)},
        {"finetune_experts": True},
    ),
    "names": ({"target_modules": ("q_proj", "fc1")}, {}),
    "ranks by pattern": (
        {"rank_pattern": (("q_proj", 4), (r"layers\.1\..*", 2)), "alpha_pattern": (("fc1", 3),)},
        {"r": 2},
    ),
    "modules in full": ({"modules_to_save": ("lm_head", "resampler_model.after_norm")}, {}),
    "layers": ({**ATTENTION, "layers_to_transform": (1,)}, {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_obeying_the_fixes_describes_the_adapter(
    case: str, write: Write, skeleton: Any, spec: JobSpec
) -> None:
    theirs, ours = OTHERS[case]
    resolve = partial(families.architecture(spec.model)[0].lora_targets, skeleton)
    stored = read_adapter("s3://b/adapter", write(**theirs), skeleton)
    with pytest.raises(SpecError) as refused:
        require_fit(stored, replace(spec.lora, **ours), resolve)
    lines: dict[str, Any] = {}
    for problem in refused.value.problems:
        assert "s3://b/adapter" in problem.message
        fix = str(problem.fix)
        lines |= (
            yaml.safe_load(f"{{{written.group(1)}}}")
            if (written := re.match(r"write (.*?)(; remove.*)?$", fix))
            else {}
        )
    selecting = ("finetune_", "target_")  # which a fix says to remove
    kept = {key: value for key, value in ours.items() if not key.startswith(selecting)}
    obeyed = load_spec(
        Path("specs/latex.yaml").read_text(),
        "x",
        [f"lora={json.dumps({**kept, **lines})}"],
        environ={},
    )
    require_fit(stored, obeyed.spec.lora, resolve)


def test_a_described_adapter_computes_what_peft_computes(
    write: Write, spec: JobSpec, skeleton: Any
) -> None:
    settings: dict[str, Any] = {
        "finetune_experts": True,
        "rank_pattern": (("q_proj", 4), ("experts.down_proj", 1)),
        "alpha_pattern": ((r"layers\.1\..*", 32),),
        "use_rslora": True,
    }
    stored = read_adapter("x", write(**settings), skeleton)
    family = families.bind(
        families.read_checkpoint("tiny", Path("job/families/builtin/ernie-vl-tiny")),
        spec.model,
        spec.data,
    )
    engine = engines.create(spec.model, spec.lora, CPU)
    ours = with_adapter(engine, engine.load(family), stored)
    theirs = engine.load_adapter(engine.load(family), stored.directory)
    assert stored.lora.r == 8
    for (name, mine), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, other), name
    scalings = [
        {n: m.scaling["default"] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        for model in (ours, theirs)
    ]
    assert scalings[0] == scalings[1]


def test_embeddings_and_output_layer_that_were_trained_apart_are_refused(
    write: Write, spec: JobSpec, skeleton: Any
) -> None:
    lora = replace(spec.lora, modules_to_save=("lm_head",))
    stored = read_adapter("x", write(modules_to_save=("lm_head",)), skeleton)
    engine = engines.create(spec.model, spec.lora, CPU)
    family = families.bind(
        families.read_checkpoint("tiny", Path("job/families/builtin/ernie-vl-tiny")),
        spec.model,
        spec.data,
    )
    model = engine.load(family)
    adapted = engine.attach_adapter(model, family.lora_targets(model, lora), lora, 0)
    with pytest.raises(InputError, match="were trained apart"):
        load_into(adapted, stored)


COUNTED: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": (("q_proj", 2), (".*_proj", 5)), "finetune_experts": True},
    "layers and DoRA": {"layers_to_transform": (0, 1), "use_dora": True},
    "tied embeddings and a norm": {"modules_to_save": ("embed_tokens", "layers.0.input_layernorm")},
    "biases beside a connector": {"modules_to_save": ("resampler_model",), "bias": "all"},
}


@pytest.mark.parametrize("case", COUNTED)
def test_the_plan_counts_what_peft_trains(case: str, spec: JobSpec) -> None:
    lora: LoraSpec = replace(spec.lora, **COUNTED[case])
    family, model = families.architecture(spec.model)
    targets = family.lora_targets(model, lora)
    counted = trained_parameters(model, targets, lora) + stored_zeros(model, targets, lora)
    config = LoraConfig(
        r=lora.r,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        rank_pattern=lora_config(targets, lora).rank_pattern,
        use_dora=lora.use_dora,
        bias=lora.bias,
        modules_to_save=list(lora.modules_to_save or ()) or None,
        ensure_weight_tying="embed_tokens" in (lora.modules_to_save or ()),
    )
    assert get_peft_model(model, config).get_nb_trainable_parameters()[0] == counted
