"""The published layout of ERNIE-4.5-VL: read without remote code and written for vLLM, exactly."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from job import families
from job.errors import InputError
from job.families.ernie45_vl import Ernie45VL
from job.families.ernie45_vl.published_format import config as published_config
from job.families.weight_files import Weights
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests.published import MARKS, train_sentencepiece

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec


@pytest.fixture(scope="module")
def bind(spec: JobSpec) -> Callable[[Path], Ernie45VL]:
    def bound(directory: Path) -> Ernie45VL:
        return families.bind(  # type: ignore[return-value]
            families.read_checkpoint(str(directory), directory), spec.model, spec.data
        )

    return bound


@pytest.fixture(scope="module")
def model(bind: Callable[[Path], Ernie45VL]) -> Any:
    """Random weights, with correction biases that differ from expert to expert."""
    model = bind(TINY).initialize(seed=1, dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "e_score_correction_bias" in name:
            parameter.data.normal_(generator=generator)
    return model


def write(
    family: Ernie45VL, model: Any, directory: Path, layout: Any, dtype: torch.dtype = torch.float32
) -> Path:
    weights = Weights.of(
        (name, parameter.to(torch.float32 if family.keeps_fp32(name) else dtype))
        for name, parameter in model.named_parameters()
    )
    family.save(model, weights, directory, dtype=dtype, max_shard_size="5MB", layout=layout)
    return directory


@pytest.fixture(scope="module")
def original(
    bind: Callable[[Path], Ernie45VL], model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write(bind(TINY), model, tmp_path_factory.mktemp("published"), "vllm")


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copied"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# --- weights -------------------------------------------------------------------------------


def test_published_names_and_values_are_those_of_transformers_own_conversion(
    original: Path, model: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    theirs = {
        name.replace("model.vision_model.", "vision_model."): tensor
        for name, tensor in weights(tmp_path).items()
    }
    assert same(weights(original), theirs)


def test_every_tensor_survives_the_way_there_and_back(
    original: Path, model: Any, bind: Callable[[Path], Ernie45VL], tmp_path: Path
) -> None:
    family = bind(original)
    loaded = family.load(dtype=torch.float32, device=CPU)
    assert same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    again = write(family, loaded, tmp_path / "published", "vllm")
    assert same(weights(again), weights(original))
    native = write(family, loaded, tmp_path / "native", "transformers")
    back = bind(native).load(dtype=torch.float32, device=CPU)
    assert same(dict(back.named_parameters()), dict(model.named_parameters()))


def test_gates_and_correction_biases_are_fp32_in_a_half_precision_checkpoint(
    model: Any, bind: Callable[[Path], Ernie45VL], tmp_path: Path
) -> None:
    stored = weights(write(bind(TINY), model, tmp_path, "vllm", torch.float16))
    routers = {n for n in stored if ".gate.weight" in n or n.endswith("e_score_correction_bias")}
    assert len(routers) == 3 * 3  # 3 sparse layers: two gates and one pair of biases
    assert {stored[name].dtype for name in routers} == {torch.float32}
    assert {t.dtype for name, t in stored.items() if name not in routers} == {torch.float16}
    loaded = bind(tmp_path).load(dtype=torch.bfloat16, device=CPU)
    for name, parameter in loaded.named_parameters():
        wanted = torch.float32 if bind(TINY).keeps_fp32(name) else torch.bfloat16
        assert parameter.dtype == wanted, name
    biases = [n for n, _ in loaded.named_parameters() if "correction_bias" in n]
    ours = dict(model.named_parameters())
    assert all(torch.equal(loaded.get_parameter(name), ours[name]) for name in biases)


def test_shards_are_no_larger_than_asked_and_indexed_whole(original: Path) -> None:
    shards = sorted(original.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert all(path.stat().st_size < 5.1e6 for path in shards)
    index = json.loads((original / "model.safetensors.index.json").read_text())
    found = {name: path.name for path in shards for name in safetensors.torch.load_file(path)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(original).values())


def test_a_head_that_is_tied_and_stored_all_the_same_is_read(
    copied: Path, bind: Callable[[Path], Ernie45VL], model: Any
) -> None:
    _change(copied, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    loaded = bind(copied).load(dtype=torch.float32, device=CPU)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert same(dict(loaded.named_parameters()), dict(model.named_parameters()))


def _change(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The checkpoint in one file, with something about it changed."""
    tensors = weights(directory)
    for path in (*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"):
        path.unlink()
    change(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_tensors_that_are_missing_superfluous_or_misshapen_are_refused_in_one_error(
    copied: Path, bind: Callable[[Path], Ernie45VL]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for number in range(7):
            del tensors[f"model.layers.1.mlp.experts.{number}.up_proj.weight"]
        tensors["model.layers.9.extra"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(3)

    _change(copied, change)
    with pytest.raises(InputError) as caught:
        bind(copied).load(dtype=torch.float32, device=CPU)
    [problem] = caught.value.problems
    assert caught.value.exit_code == 12
    text = str(problem)
    assert "7 are missing: model.layers.1.mlp.experts.0.up_proj.weight" in text
    assert "experts.4.up_proj" in text
    assert "experts.5.up_proj" not in text
    assert "1 are not of this model: model.layers.9.extra" in text
    assert "1 have another shape: model.norm.weight is [3] instead of [256]" in text


def test_a_shard_that_is_missing_or_cut_off_is_refused_by_name(
    copied: Path, bind: Callable[[Path], Ernie45VL]
) -> None:
    second = sorted(copied.glob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:100_000])
    with pytest.raises(InputError, match=f"{second.name} cannot be read"):
        bind(copied).load(dtype=torch.float32, device=CPU)
    second.unlink()
    with pytest.raises(InputError, match=f"1 of . weight files are missing: {second.name}"):
        bind(copied).load(dtype=torch.float32, device=CPU)


# --- config.json ---------------------------------------------------------------------------

# The fields of the published 28B checkpoint that the translation reads.
PUBLISHED_28B: dict[str, Any] = {
    "model_type": "ernie4_5_moe_vl",
    "torch_dtype": "bfloat16",
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "use_bias": False,
    "use_cache": False,
    "tie_word_embeddings": True,
    "im_patch_id": 100295,
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "rope_theta": 500000,
    "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]},
    "freq_allocation": 20,
    "pixel_hidden_size": 1280,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "vision_config": {
        "model_type": "DFNRope_vision_transformer",
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1280,
        "hidden_act": "quick_gelu",
        "in_channels": 3,
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
    },
}


def test_the_published_28b_config_is_the_default_of_transformers_class() -> None:
    from transformers import Ernie4_5_VLMoeConfig

    nested = published_config.to_nested(PUBLISHED_28B)
    assert nested.pop("dtype") == "bfloat16"
    nested.pop("architectures")
    default = Ernie4_5_VLMoeConfig()
    default.text_config.rope_parameters["mrope_section"] = [22, 22, 20]  # the model's own default
    assert Ernie4_5_VLMoeConfig.from_dict(nested).to_dict() == default.to_dict()


def test_a_config_survives_the_way_there_and_back() -> None:
    flat = published_config.to_flat(published_config.to_nested(PUBLISHED_28B))
    # The last sparse layer is named as it is, where the published config names one past it.
    expected = {**PUBLISHED_28B, "moe_layer_end_index": [27, 27], "use_cache": True}
    del expected["torch_dtype"]
    assert {key: flat[key] for key in expected} == expected
    assert "head_dim" not in flat
    native = json.loads((TINY / "config.json").read_text())
    native["text_config"]["head_dim"] = 128
    there = published_config.to_flat(native)
    assert there["head_dim"] == 128
    assert published_config.to_flat(published_config.to_nested(there)) == there


@pytest.mark.parametrize(
    ("start", "end", "interval", "sparse"),
    [
        ([1, 1], [3, 3], 1, [1, 2, 3]),
        ([0, 2], [1, 9], 2, [1, 3, 5]),
        ([2, 3], [4, 4], 1, [2, 3, 4]),
    ],
)
def test_sparse_layers_are_those_of_the_published_rule(
    start: list[int], end: list[int], interval: int, sparse: list[int]
) -> None:
    flat = {
        **PUBLISHED_28B,
        "num_hidden_layers": 6,
        "moe_layer_start_index": start,
        "moe_layer_end_index": end,
        "moe_layer_interval": interval,
    }
    nested = published_config.to_nested(flat)
    kinds = nested["text_config"]["mlp_layer_types"]
    assert [i for i, kind in enumerate(kinds) if kind == "sparse"] == sparse
    back = published_config.to_nested(published_config.to_flat(nested))
    assert back["text_config"]["mlp_layer_types"] == kinds


def test_a_config_that_cannot_be_translated_is_refused(
    copied: Path, bind: Callable[[Path], Ernie45VL]
) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "moe_num_experts": [4, 8]}))
    with pytest.raises(InputError, match=r"must be two equal numbers, not \[4, 8\]"):
        bind(copied)
    del config["vision_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="vision_config"):
        bind(copied)


# --- tokenizer, images, template ---------------------------------------------------------


def test_a_translated_checkpoint_has_the_processor_that_it_was_written_with(
    original: Path, bind: Callable[[Path], Ernie45VL]
) -> None:
    before, after = bind(TINY).processor, bind(original).processor
    assert after.chat_template == before.chat_template
    assert after.tokenizer.backend_tokenizer.to_str() == before.tokenizer.backend_tokenizer.to_str()
    assert set(after.tokenizer.all_special_tokens) == set(before.tokenizer.all_special_tokens)
    assert after.image_processor.to_dict() == before.image_processor.to_dict()
    assert after.video_processor.to_dict() == before.video_processor.to_dict()
    assert after.video_token_id == before.video_token_id


def test_limits_of_the_spec_bind_what_is_read_and_what_is_written(
    original: Path, model: Any, spec: JobSpec, tmp_path: Path
) -> None:
    checkpoint = families.read_checkpoint("published", original)
    narrow = Ernie45VL.bind(checkpoint, replace(spec.data, max_pixels=100 * 28 * 28))
    assert narrow.processor.image_processor.size["longest_edge"] == 100 * 28 * 28
    write(narrow, model, tmp_path, "vllm")
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["max_pixels"] == 100 * 28 * 28


def test_what_vllm_runs_reads_the_folder_alone_and_cuts_images_as_training_does(
    original: Path,
    bind: Callable[[Path], Ernie45VL],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from transformers import AutoConfig, AutoProcessor, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    config = AutoConfig.from_pretrained(original, trust_remote_code=True)
    assert (config.spatial_conv_size, config.vision_config.embed_dim) == (2, 128)
    processor = AutoProcessor.from_pretrained(original, trust_remote_code=True)
    native = bind(TINY).processor
    images = [Image.effect_noise(size, 64).convert("RGB") for size in ((300, 50), (56, 84))]
    made = processor(text=["a"], images=images, videos=[])
    expected = native.image_processor(images=images, return_tensors="pt")
    mean, std = (
        torch.tensor(values).repeat_interleave(14 * 14)
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    scaled = made["images"].float() * processor.image_processor.rescale_factor
    assert torch.allclose((scaled - mean) / std, expected["pixel_values"], atol=1e-5)
    assert torch.equal(made["grid_thw"], expected["image_grid_thw"])
    frames = torch.randint(0, 255, (3, 64, 96, 3), dtype=torch.uint8).numpy()
    video = processor(text=["a"], images=[], videos=[(frames, {"fps": 2})])
    assert video["grid_thw"][0, 0] == 4  # an even number of frames
    assert len(video["images"]) == video["grid_thw"].prod()


def test_the_template_for_servers_has_the_placeholders_that_they_replace(
    original: Path, bind: Callable[[Path], Ernie45VL]
) -> None:
    template = (original / "chat_template.jinja").read_text()
    assert "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>" in template
    assert "<|IMAGE_PLACEHOLDER|>" not in template


def test_a_published_folder_with_a_sentencepiece_model_is_read_and_written_again(
    copied: Path,
    bind: Callable[[Path], Ernie45VL],
    model: Any,
    tmp_path: Path,
) -> None:
    """The folder as it is published: remote code that nobody runs, template in a json file."""
    template = (copied / "chat_template.jinja").read_text()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (copied / name).unlink()
    train_sentencepiece(copied / "tokenizer.model", "bpe")
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (copied / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Ernie4_5_VLTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization.Ernie4_5_VLTokenizer", None]},
                "eos_token": {"content": "</s>", "special": True},
                "model_max_length": 8192,
            }
        )
    )
    (copied / "processing_ernie45_vl.py").write_text("raise RuntimeError('remote code ran')")
    settings = json.loads((copied / "preprocessor_config.json").read_text())
    size = {"min_pixels": settings.pop("min_pixels"), "max_pixels": settings.pop("max_pixels")}
    del settings["video_processor"]
    (copied / "preprocessor_config.json").write_text(json.dumps({**settings, "size": size}))

    tokenizer = bind(copied).processor.tokenizer
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)
    assert tokenizer.sep_token == "<|end_of_sentence|>"
    # Answers end as the template ends them, and as the tokenizer says; servers are told both.
    assert bind(copied).end_tokens == (2, tokenizer.sep_token_id)
    assert tokenizer.model_max_length == 8192
    digits = tokenizer("12", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(digits, skip_special_tokens=True) == "12"
    assert tokenizer.decode(tokenizer("".join(MARKS))["input_ids"], skip_special_tokens=True) == ""
    assert bind(copied).processor.image_processor.size["longest_edge"] == size["max_pixels"]

    written = write(bind(copied), model, tmp_path / "again", "vllm")
    generation = json.loads((written / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, tokenizer.sep_token_id]
    again = bind(written).processor.tokenizer
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.all_special_tokens == tokenizer.all_special_tokens


def test_digits_that_a_conversion_made_special_are_text_again(
    copied: Path, bind: Callable[[Path], Ernie45VL]
) -> None:
    path = copied / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    digit = tokenizer["model"]["vocab"]["7"]
    added = {**tokenizer["added_tokens"][-1], "id": digit, "content": "7", "special": True}
    tokenizer["added_tokens"].append(added)
    path.write_text(json.dumps(tokenizer))
    read = bind(copied).processor.tokenizer
    assert read.decode(read("x7")["input_ids"], skip_special_tokens=True) == "x7"


def test_a_tokenizer_that_is_not_of_this_model_is_refused(
    copied: Path, bind: Callable[[Path], Ernie45VL], tmp_path: Path
) -> None:
    (copied / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        bind(copied)
    train_sentencepiece(copied / "tokenizer.model", "unigram")
    with pytest.raises(InputError, match="not a sentencepiece model of type BPE"):
        bind(copied)
    (copied / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        bind(copied)
