"""The Auto families on tiny models: tokens, tensors, targets, files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
import transformers

from job import engines, families, kubernetes
from job.engines.device import Accelerator
from job.engines.transformers import TransformersEngine
from job.errors import DataError, InputError, SpecError
from job.export.merge import Merge
from job.families import FAMILIES, Family, chat, transformers_format
from job.families.batches import host_keys
from job.families.encoded import IGNORED, Encoded
from job.families.lora.parameter_counts import adapter_parameters
from job.families.lora.targets import OTHER, kind_of
from job.kubernetes.options import ManifestOptions
from job.planning import sizes
from job.prep.images import decode
from job.prep.rows import Row
from job.spec import keys
from job.spec.load import load_spec
from job.spec.types import JobSpec
from job.train.length_filter import truncate
from tests.models import BUILDERS, add_noise
from tests.unit.families.test_ernie45_vl import CONVERSATIONS, image, row, turn

CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
READERS = ("qwen_vl", "idefics3")
ENDS = {"llama": "<|eot_id|>", "idefics3": "<end_of_utterance>"}
TEXTS = {name: each for name, each in CONVERSATIONS.items() if not each.images}
TEXTS["turns"] = row(
    turn("system", "Count."),
    turn("user", "1?"),
    turn("assistant", "one"),
    turn("user", "2?"),
    turn("assistant", "two"),
)


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec


@pytest.fixture(scope="module", params=list(BUILDERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / kind
    BUILDERS[kind](directory)
    return directory


@pytest.fixture(scope="module")
def family(folder: Path, spec: JobSpec) -> Family:
    checkpoint = families.read_checkpoint(str(folder), folder)
    return families.bind(checkpoint, spec.model, spec.data)


@pytest.fixture(scope="module")
def model(family: Family, spec: JobSpec) -> Any:
    return engines.create(spec.model, spec.lora, CPU).load(family)


def conversations(family: Family) -> dict[str, Row]:
    return CONVERSATIONS | TEXTS if family.reads_images else TEXTS


def of_model(spec: JobSpec, folder: Path, **lora: Any) -> JobSpec:
    model = replace(spec.model, model_name_or_path=str(folder), init="pretrained")
    return replace(spec, model=model, lora=replace(spec.lora, **lora))


# --- finding the family ---------------------------------------------------------------------


def test_the_schema_offers_every_family() -> None:
    offered = keys.at(("model", "family"))
    assert offered is not None
    assert offered["enum"] == ["auto", *(family.name for family in FAMILIES)]


def test_a_checkpoint_is_recognized_by_its_config(kind: str, folder: Path, spec: JobSpec) -> None:
    found = families.resolve_offline(of_model(spec, folder).model)
    assert found is not None
    assert found.name == ("vlm" if kind in READERS else "llm")


def test_a_model_that_no_class_makes_is_refused_by_its_type(tmp_path: Path, spec: JobSpec) -> None:
    configs: tuple[dict[str, Any], ...] = (
        {"model_type": "vit"},
        {"model_type": "no-such"},
        {"vision_config": {}},
    )
    for config in configs:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(SpecError, match="belongs to no known family"):
            families.architecture(of_model(spec, tmp_path).model)


def test_a_config_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"its config\.json is not JSON: it is nested too deeply"):
        families.read_checkpoint("m", tmp_path)


def test_quantized_weights_are_refused(folder: Path, tmp_path: Path, spec: JobSpec) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantized"):
        families.architecture(of_model(spec, tmp_path).model)


def test_a_checkpoint_without_a_chat_template_is_refused(
    folder: Path, tmp_path: Path, spec: JobSpec
) -> None:
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(InputError, match="has no chat template"):
        families.bind(families.read_checkpoint("m", tmp_path), spec.model, spec.data)


def test_a_checkpoint_with_a_tensor_missing_or_misshapen_is_refused(
    folder: Path, tmp_path: Path, spec: JobSpec
) -> None:
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).symlink_to(path)
    family = families.bind(families.read_checkpoint("m", tmp_path), spec.model, spec.data)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight") and "vis" not in name)
    right, weights = tensors[name], tmp_path / "model.safetensors"
    for wrong, what in ((None, "missing"), (right[:-1].clone(), "misshapen")):
        kept = {k: v for k, v in {**tensors, name: wrong}.items() if v is not None}
        safetensors.torch.save_file(kept, weights, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"1 tensors of its config.json are {what}: .*q_proj"):
            engines.create(spec.model, spec.lora, CPU).load(family)


def test_experts_that_cannot_be_stacked_are_refused_by_name(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.1.up_proj.weight"))
    said = (f"1 tensors of its config.json are misshapen: {name}", "cannot convert its tensors")
    for wrong, problem in zip((tensors.pop(name)[:-1].clone(), None), said, strict=True):
        kept = {k: v for k, v in {**tensors, name: wrong}.items() if v is not None}
        weights = tmp_path / "model.safetensors"
        safetensors.torch.save_file(kept, weights, metadata={"format": "pt"})
        with pytest.raises(InputError, match=problem) as refused:
            transformers_format.load(
                transformers.AutoModelForCausalLM,
                "m",
                tmp_path,
                dtype=torch.float32,
                device=torch.device("cpu"),
                attn_implementation=None,
            )
        assert "was copied whole" in str(refused.value)


def test_a_model_without_experts_is_prepared_for_a_gpu_and_has_no_choice_of_theirs(
    model: Any, family: Family, spec: JobSpec
) -> None:
    engine = cast(TransformersEngine, engines.create(spec.model, spec.lora, CPU))
    replace(engine, device=torch.device("cuda")).prepare(model, family)
    asked = replace(spec.model, experts_implementation="grouped_mm")
    ernies = replace(spec.model, experts_implementation="sorted_grouped_mm")
    for chosen in (asked, ernies):
        with pytest.raises(SpecError, match="does not apply to this model"):
            replace(engine, model=chosen).prepare(model, family)


# --- rows -----------------------------------------------------------------------------------


def test_the_trained_tokens_are_the_answers_and_their_end_tokens(kind: str, family: Family) -> None:
    end, before = ENDS.get(kind, "<|im_end|>"), " " if kind == "idefics3" else ""
    for said in conversations(family).values():
        encoded = family.encode(said)
        trained = [token for token in encoded.labels if token != IGNORED]
        answers = [before + m.text + end for m in said.messages if m.role == "assistant"]
        assert family.processor.tokenizer.decode(trained) == "".join(answers)
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
            assert label in (IGNORED, token)
        assert encoded.labels[-1] in family.end_tokens


def test_training_sees_the_tokens_that_generation_starts_from(family: Family) -> None:
    for said in conversations(family).values():
        whole = family.encode(said)
        prompt = family.encode_prompt("p", said.prompt, said.images)
        assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_a_tokenizer_that_begins_texts_with_a_space_begins_no_answer_with_it(
    tmp_path: Path, spec: JobSpec
) -> None:
    from tokenizers import Tokenizer, pre_tokenizers

    BUILDERS["llama"](tmp_path)
    file = tmp_path / "tokenizer.json"
    words = Tokenizer.from_file(str(file))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), words.pre_tokenizer]
    )
    words.save(str(file))
    family = families.bind(families.read_checkpoint("m", tmp_path), spec.model, spec.data)
    tokenizer = family.processor.tokenizer
    said = TEXTS["turns"]
    encoded = family.encode(said)
    turns = chat.turns(said.messages, as_text=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert len(tokenizer("two", add_special_tokens=False).input_ids) > len("two")
    assert list(encoded.input_ids) == tokenizer(whole, add_special_tokens=False).input_ids


def test_tokens_and_tensors_are_those_of_the_processor(family: Family) -> None:
    if not family.reads_images:
        pytest.skip("the model is text-only")
    for said in (each for each in CONVERSATIONS.values() if each.images):
        encoded = family.encode_prompt("p", said.prompt, said.images)
        text = cast(Any, family)._render_template(
            chat.turns(said.prompt), add_generation_prompt=True
        )
        images = [[decode(i) for i in encoded.images]]
        expected = cast(Any, family).processor(
            text=[text], images=images, return_tensors="pt", add_special_tokens=False
        )
        batch: Any = family.collate_prompts([encoded])
        assert expected.keys() <= batch.keys()
        for key, tensor in expected.items():
            assert torch.equal(batch[key], tensor), key


def test_padding_changes_no_logits(family: Family, model: Any) -> None:
    every = list(conversations(family).values())
    encoded = [family.encode(said) for said in every]
    batch = family.collate(encoded)
    assert host_keys(batch) == ()
    with torch.no_grad():
        together = model(**batch).logits
        for number, one in enumerate(encoded):
            alone = model(**family.collate([one])).logits[0]
            assert torch.allclose(alone, together[number, : len(alone)], atol=1e-4), number


def test_prompts_are_padded_on_the_left_and_answered_as_alone(family: Family, model: Any) -> None:
    every = list(conversations(family).values())
    prompts = [family.encode_prompt("p", said.prompt, said.images) for said in every]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

    def answers(chosen: list[Encoded]) -> list[list[int]]:
        written: Any = model.generate(**family.collate_prompts(chosen), **settings)
        return [row[-5:] for row in written.tolist()]

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


def test_image_tokens_and_their_brackets_survive_truncation(
    kind: str, family: Family, spec: JobSpec
) -> None:
    if not family.reads_images:
        pytest.skip("the model is text-only")
    said = row(turn("user", 0, "long " * 40), turn("assistant", "x"), images=(image(90, 40),))
    encoded = family.encode(said)
    train = replace(spec.train, max_length=len(encoded.input_ids) - 60)
    data = replace(spec.data, truncation_strategy="left")
    cut = truncate(encoded, family, data, train)
    assert cut is not None
    tokenizer = family.processor.tokenizer
    names = {
        "qwen_vl": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        "idefics3": ("<image>", "<fake_token_around_image>", "<row_1_col_1>", "<global-img>"),
    }[kind]
    for token in tokenizer.convert_tokens_to_ids(list(names)):
        assert cut.input_ids.count(token) == encoded.input_ids.count(token) > 0


def test_control_tokens_and_images_that_a_model_cannot_read_are_refused(
    kind: str, family: Family
) -> None:
    end = ENDS.get(kind, "<|im_end|>")
    with pytest.raises(DataError, match="control token"):
        family.encode(row(turn("user", f"a {end} b"), turn("assistant", "c")))
    if not family.reads_images:
        with pytest.raises(DataError, match="but the model is text-only"):
            family.encode(CONVERSATIONS["one image"])


def test_bounds_on_pixels_hold_or_are_refused(kind: str, folder: Path, spec: JobSpec) -> None:
    checkpoint = families.read_checkpoint(str(folder), folder)
    data = replace(spec.data, max_pixels=28 * 28 * 4)
    if kind != "qwen_vl":
        with pytest.raises(SpecError, match="max_pixels"):
            families.bind(checkpoint, spec.model, data)
        return
    family = families.bind(checkpoint, spec.model, data)
    said = row(turn("user", 0), turn("assistant", "x"), images=(image(300, 300),))
    unbound = families.bind(checkpoint, spec.model, spec.data)
    image_token = cast(Any, family).processor.image_token_id
    assert 4 < unbound.encode(said).input_ids.count(image_token) <= 64
    assert 0 < family.encode(said).input_ids.count(image_token) <= 4


# --- LoRA, merging, files --------------------------------------------------------------------


def test_each_toggle_selects_its_own_modules(kind: str, family: Family, spec: JobSpec) -> None:
    skeleton = family.meta_model()

    def groups(**lora: Any) -> dict[str, int]:
        return family.lora_targets(skeleton, replace(spec.lora, **lora)).counts

    language = {"language attention": 8, "language mlp": 6}
    vision = {
        "qwen_vl": {"vision attention": 4, "vision mlp": 6, "connector": 2},
        "idefics3": {"vision attention": 8, "vision mlp": 4, "connector": 1},
    }.get(kind, {})
    assert groups() == language | vision
    assert groups(finetune_vision_layers=False) == language
    assert list(groups(finetune_mlp_modules=False)) == [k for k in language | vision if "att" in k]
    if vision:
        assert groups(finetune_language_layers=False) == vision
    named = groups(target_modules=("q_proj",))
    assert named == {k: n // 4 for k, n in (language | vision).items() if "att" in k and n == 8}


def test_kinds_go_by_place_and_parent() -> None:
    place = "model.language_model."
    kinds = {
        "model.language_model.layers.0.self_attn.q_proj": "language attention",
        "model.language_model.layers.0.mlp.experts.3.down_proj": "language mlp",
        "model.language_model.layers.0.mlp.gate": OTHER,
        "model.language_model.layers.0.mixer.in_proj": OTHER,
        "model.vision_tower.encoder.layers.0.attention.qkv": "vision attention",
        "model.visual.merger.mlp.0": "connector",
        "model.audio_tower.layers.0.self_attn.q_proj": OTHER,
        "lm_head": OTHER,
    }
    assert {name: kind_of(name, place) for name in kinds} == kinds
    assert kind_of("h.0.attn.c_proj", "") == "language attention"


def test_what_these_families_do_not_adapt_is_refused(family: Family, spec: JobSpec) -> None:
    skeleton = family.meta_model()
    for lora in ({"finetune_experts": True}, {"target_parameters": ("norm.weight",)}):
        with pytest.raises(SpecError, match="bare parameters"):
            family.lora_targets(skeleton, replace(spec.lora, **cast(Any, lora)))
    with pytest.raises(SpecError, match="names no linear module"):
        family.lora_targets(skeleton, replace(spec.lora, target_modules=("query",)))
    with pytest.raises(SpecError, match="weights a loss that"):
        family.set_router_aux_loss(skeleton, 0.1)


@pytest.mark.parametrize(
    ("settings", "text", "images"),
    [
        ({}, (), ("vision attention", "vision mlp", "connector")),
        ({"finetune_vision_layers": False}, (), ()),
        ({"finetune_vision_layers": False, "use_dora": True}, ("DoRA",), ("DoRA",)),
        ({"target_modules": ("q_proj", "down_proj")}, (), ("modules by name",)),
        ({"target_modules": ("lm_head",)}, ("modules by name",), ("modules by name",)),
    ],
)
def test_what_is_served_merged_only_is_known_from_the_spec(
    spec: JobSpec, settings: dict[str, Any], text: tuple[str, ...], images: tuple[str, ...]
) -> None:
    lora = replace(spec.lora, **settings)
    found = {f.name: f.adapter_serving(lora).merged_only for f in FAMILIES}
    assert (found["llm"], found["vlm"]) == (text, images)


def test_merged_weights_reload_tensor_by_tensor_under_the_names_of_the_checkpoint(
    family: Family, folder: Path, spec: JobSpec, tmp_path: Path
) -> None:
    engine = engines.create(spec.model, spec.lora, CPU)
    targets = family.lora_targets(family.meta_model(), spec.lora)
    adapted: Any = engine.attach_adapter(engine.load(family), targets, spec.lora, 5)
    add_noise(adapted, 0.05)
    merge = Merge(adapted, dtype=torch.float32, keeps_fp32=family.keeps_fp32)
    family.save(
        adapted.get_base_model(),
        merge.weights(),
        tmp_path,
        dtype=torch.float32,
        max_shard_size="100KB",
        layout="vllm",
    )
    assert merge.changed == merge.adapted == len(targets.modules)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    published = safetensors.torch.load_file(folder / "model.safetensors")
    assert index["weight_map"].keys() == published.keys()
    again = families.bind(families.read_checkpoint("m", tmp_path), spec.model, spec.data)
    reloaded = dict(engine.load(again).named_parameters())
    # PEFT's own merge says the same.
    theirs = dict(adapted.merge_and_unload().named_parameters())
    assert reloaded.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(reloaded[name], tensor, atol=1e-6), name


# --- what is known before anything is loaded --------------------------------------------------


def test_sizes_are_those_of_the_model(
    family: Family, model: Any, folder: Path, spec: JobSpec
) -> None:
    found = sizes.measure(of_model(spec, folder))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    targets = family.lora_targets(family.meta_model(), spec.lora)
    assert 0 < found.trainable < found.parameters
    groups = [adapter_parameters(model, group, spec.lora) for group in targets.groups]
    assert found.trainable == sum(groups)


def test_a_manifest_serves_weights_without_code_and_asks_as_the_model_reads(
    kind: str, folder: Path
) -> None:
    sets = (f"model.model_name_or_path={folder}",)
    options = ManifestOptions(spec="specs/text.yaml", sets=sets, output="s3://bucket/x", environ={})
    assert "--trust-remote-code" not in kubernetes.render(options, "nvidia", kind="vllm")
    asked = kubernetes.render(options, "nvidia", kind="vllm-smoke")
    assert ("--no-image" in asked) is (kind not in READERS)
