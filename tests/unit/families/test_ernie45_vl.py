"""The ERNIE-4.5-VL family on the builtin tiny model: rows to tensors, LoRA targets, files."""

import filecmp
import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from job import families
from job.errors import DataError, SpecError
from job.evaluation.generate import to_texts
from job.families import chat
from job.families.encoded import IGNORED
from job.families.ernie45_vl import EMPTY_THOUGHT, Ernie45VL, vision_attention
from job.families.ernie45_vl.image_processing import mean_and_std, normalized, patches
from job.families.ernie45_vl.mrope import mrope_positions
from job.families.ernie45_vl.tiny import build
from job.prep.images import decode, inspect
from job.prep.rows import EncodedImage, Message, Part, Row
from job.spec.load import load_spec
from job.spec.types import JobSpec

EOS = "<|end_of_sentence|>"
VISION_INDICES = ("image_cu_seqlens", "image_position_ids")
TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    text = Path("specs/latex.yaml").read_text()
    return load_spec(text, "specs/latex.yaml", environ={}).spec


@pytest.fixture(scope="module")
def family(spec: JobSpec) -> Ernie45VL:
    return Ernie45VL.bind(families.read_checkpoint("builtin://ernie-vl-tiny", TINY), spec.data)


@pytest.fixture(scope="module")
def model(family: Ernie45VL) -> Any:
    return family.initialize(seed=1, dtype=torch.float32, device=torch.device("cpu"))


def image(width: int, height: int) -> EncodedImage:
    noise = Image.effect_noise((width, height), 64).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "PNG")
    return inspect(file.getvalue())


def turn(role: str, *parts: str | int) -> Message:
    return Message(
        role=role,  # type: ignore[arg-type]
        parts=tuple(Part(text=p) if isinstance(p, str) else Part(image=p) for p in parts),
    )


def row(*messages: Message, images: tuple[EncodedImage, ...] = ()) -> Row:
    return Row(id="test:1", messages=messages, images=images)


def test_the_embedded_checkpoint_is_what_its_module_builds(tmp_path: Path) -> None:
    build(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    match, differing, missing = filecmp.cmpfiles(tmp_path, TINY, made, shallow=False)
    assert (sorted(match), differing, missing) == (sorted(made), [], [])


CONVERSATIONS = {
    "one image": row(turn("user", 0, "Read."), turn("assistant", "x^{2}"), images=(image(90, 40),)),
    "two images": row(
        turn("user", 0, "and", 1, "Compare."),
        turn("assistant", "same"),
        images=(image(60, 60), image(200, 30)),
    ),
    "many turns": row(
        turn("system", "You read formulas."),
        turn("user", 0, "Read."),
        turn("assistant", "a"),
        turn("user", "And this?", 1),
        turn("assistant", "b"),
        images=(image(70, 70), image(120, 60)),
    ),
    "no image": row(turn("user", "Hello"), turn("assistant", "Hi")),
    "Chinese": row(turn("user", "写出公式。"), turn("assistant", "\\alpha 是角")),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_trained_tokens_are_the_answers_and_their_end_tokens(
    family: Ernie45VL, name: str
) -> None:
    conversation = CONVERSATIONS[name]
    encoded = family.encode(conversation)
    trained = [token for token in encoded.labels if token != IGNORED]
    answers = [
        m.text + "<|end_of_sentence|>" for m in conversation.messages if m.role == "assistant"
    ]
    assert family.processor.tokenizer.decode(trained) == "".join(answers)
    assert all(
        label in (IGNORED, token)
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_training_sees_the_tokens_that_generation_starts_from(family: Ernie45VL, name: str) -> None:
    conversation = CONVERSATIONS[name]
    whole = family.encode(conversation)
    prompt = family.encode_prompt("p", conversation.prompt, conversation.images)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_an_answer_ends_at_the_token_that_is_trained_as_its_end(family: Ernie45VL) -> None:
    encoded = family.encode(CONVERSATIONS["one image"])
    assert family.end_tokens == (encoded.labels[-1],) == (family.processor.tokenizer.eos_token_id,)


def test_an_answer_follows_an_empty_thinking_block(family: Ernie45VL) -> None:
    encoded = family.encode(CONVERSATIONS["one image"])
    text = family.processor.tokenizer.decode(encoded.input_ids)
    assert text.endswith("Assistant: <think>\n\n</think>\n\nx^{2}<|end_of_sentence|>")


def test_thoughts_are_trained_after_the_prompt_of_a_model_that_thinks(family: Ernie45VL) -> None:
    plain = CONVERSATIONS["one image"]
    answer = replace(plain.messages[-1], reasoning="\nTwo of x.\n")
    thoughtful = Row.from_record(replace(plain, messages=(*plain.prompt, answer)).to_record())
    assert thoughtful.messages[-1].reasoning == "\nTwo of x.\n"
    encoded = family.encode(thoughtful)
    prompt = family.encode_prompt("p", plain.prompt, plain.images, enable_thinking=True)
    start = len(prompt.input_ids)
    assert encoded.input_ids[:start] == prompt.input_ids
    assert set(encoded.labels[:start]) == {IGNORED}
    assert encoded.labels[start:] == encoded.input_ids[start:]
    tokenizer = family.processor.tokenizer
    assert tokenizer.decode(prompt.input_ids).endswith("Assistant: <think>")
    written = "\nTwo of x.\n</think>\n\nx^{2}"
    assert tokenizer.decode(encoded.labels[start:]) == f"{written}<|end_of_sentence|>"
    tokens = [encoded.labels[start:-1], encoded.labels[start : start + 3]]
    assert to_texts(family, tokens, thinks=True)[0] == "x^{2}"
    assert to_texts(family, tokens, thinks=False)[0] == written.strip()
    assert to_texts(family, tokens, thinks=True)[1]  # cut short, so the thoughts are the answer
    with pytest.raises(DataError, match="control token"):
        family.encode(
            replace(plain, messages=(*plain.prompt, replace(answer, reasoning=f"a{EOS}")))
        )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_equal_those_of_the_processor(family: Ernie45VL, name: str) -> None:
    conversation = CONVERSATIONS[name]
    encoded = family.encode_prompt("p", conversation.prompt, conversation.images)
    turns = chat.turns(conversation.prompt, reasoning_content=EMPTY_THOUGHT)
    text = family._render_template(turns, add_generation_prompt=True)
    images = [decode(i) for i in encoded.images] or None
    expected = family.processor(text=[text], images=images, return_tensors="pt")
    batch = family.collate_prompts([encoded])
    for key in ("input_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "pixel_values"):
        if key in expected:
            assert torch.equal(batch[key], torch.as_tensor(expected[key])), key


def test_positions_equal_those_of_the_model(family: Ernie45VL, model: Any) -> None:
    rows = [family.encode(c) for c in CONVERSATIONS.values() if c.images]
    batch = family.collate(rows)
    expected, _ = model.model.get_rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        batch["image_grid_thw"],
        None,
        batch["attention_mask"],
    )
    assert torch.equal(batch["position_ids"], expected)


def test_images_next_to_each_other_keep_their_own_positions() -> None:
    positions = mrope_positions(
        [[False, *[True] * 8, False]], [(1, 4, 4), (1, 2, 8)], spatial_merge_size=2, length=10
    )
    assert positions[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 3, 3, 3, 3, 7],
        [0, 1, 1, 2, 2, 3, 3, 3, 3, 7],
        [0, 1, 2, 1, 2, 3, 4, 5, 6, 7],
    ]


def test_padding_changes_no_loss(family: Ernie45VL, model: Any) -> None:
    short, long = CONVERSATIONS["one image"], CONVERSATIONS["many turns"]
    with torch.no_grad():
        alone = model(**family.collate([family.encode(short)])).logits[0]
        padded = model(**family.collate([family.encode(short), family.encode(long)])).logits[0]
    assert torch.allclose(alone, padded[: len(alone)], atol=1e-5)


@pytest.mark.parametrize("token", ["<|IMAGE_PLACEHOLDER|>", "<|end_of_sentence|>"])
def test_a_control_token_typed_in_a_text_is_refused(family: Ernie45VL, token: str) -> None:
    with pytest.raises(DataError, match="control token"):
        family.encode(row(turn("user", f"a {token} b"), turn("assistant", "c")))


def test_the_reference_targets_leave_out_routed_experts_and_vision_attention(
    family: Ernie45VL, model: Any, spec: JobSpec
) -> None:
    targets = family.lora_targets(model, spec.lora)
    leaves = {name.rpartition(".")[2] for name in targets.modules}
    assert leaves == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj", "fc1", "fc2"),
    }
    # 4 layers × (4 attention + 3 MLP), 4 vision blocks × 2, two resampler MLPs × 2
    assert targets.counts == {
        "language attention": 16,
        "language mlp": 12,
        "vision mlp": 8,
        "resampler": 4,
    }
    assert targets.parameters == ()


def test_each_toggle_selects_its_own_group(family: Ernie45VL, model: Any, spec: JobSpec) -> None:
    def groups(**toggles: Any) -> set[str]:
        return set(family.lora_targets(model, replace(spec.lora, **toggles)).counts)

    language, vision = "finetune_language_layers", "finetune_vision_layers"
    attention, mlp = "finetune_attention_modules", "finetune_mlp_modules"
    default = {"language attention", "language mlp", "vision mlp", "resampler"}
    assert groups() == default
    for chosen in itertools.product((True, False), (True, False), (None, False), (True, False)):
        toggles = dict(zip((language, vision, attention, mlp), chosen, strict=True))
        parts = {part for part in ("language", "vision") if toggles[f"finetune_{part}_layers"]}
        kinds = {"attention"} if toggles[attention] is None else set[str]()
        kinds |= {"mlp"} if toggles[mlp] else set()
        expected = {f"{part} {kind}" for part in parts for kind in kinds}
        expected |= {"resampler"} if "vision mlp" in expected else set()
        if expected:
            assert groups(**toggles) == (default if len(expected) == 5 else expected), toggles
        else:
            with pytest.raises(SpecError, match="selects no module"):
                groups(**toggles)
    assert groups(finetune_experts=True) == default | {"routed experts"}


def test_a_spec_resolved_when_true_was_the_default_selects_what_it_did(
    family: Ernie45VL, model: Any, spec: JobSpec
) -> None:
    def groups(*off: str) -> set[str]:
        toggles: dict[str, Any] = dict.fromkeys((f"finetune_{each}" for each in off), False)
        lora = replace(spec.lora, finetune_attention_modules=True, **toggles)
        return set(family.lora_targets(model, lora).counts)

    language, tower = {"language attention", "language mlp"}, {"vision mlp", "resampler"}
    assert groups() == language | tower
    assert groups("mlp_modules") == {"language attention"}
    assert groups("language_layers") == tower
    assert groups("vision_layers") == language
    assert groups("language_layers", "mlp_modules") == {"vision attention"}  # nothing, then


def test_a_target_that_selects_nothing_is_refused_by_name(
    family: Ernie45VL, model: Any, spec: JobSpec
) -> None:
    with pytest.raises(SpecError, match=r"known names: .*q_proj"):
        family.lora_targets(model, replace(spec.lora, target_modules=("query",)))


def test_a_seed_means_one_set_of_weights(family: Ernie45VL, model: Any) -> None:
    torch.manual_seed(99)
    again = family.initialize(seed=1, dtype=torch.float32, device=torch.device("cpu"))
    other = family.initialize(seed=2, dtype=torch.float32, device=torch.device("cpu"))
    names = dict(model.named_parameters())
    assert all(torch.equal(p, names[n]) for n, p in again.named_parameters())
    assert not all(torch.equal(p, names[n]) for n, p in other.named_parameters())


def test_router_gates_stay_fp32_in_half_precision(family: Ernie45VL) -> None:
    half = family.initialize(seed=1, dtype=torch.float16, device=torch.device("cpu"))
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    gates = [name for name in kinds if family.keeps_fp32(name)]
    assert len(gates) == 3 * 2 * 2  # 3 sparse layers, text and vision, gate and correction bias
    assert {kinds[name] for name in gates} == {torch.float32}
    assert {kind for name, kind in kinds.items() if name not in gates} == {torch.float16}


def test_the_auxiliary_loss_of_the_router_is_added_by_its_coefficient(
    family: Ernie45VL, model: Any
) -> None:
    batch = family.collate([family.encode(CONVERSATIONS["one image"])])
    with torch.no_grad():
        family.set_router_aux_loss(model, 0)
        plain = model(**batch).loss
        family.set_router_aux_loss(model, 0.5)
        added = model(**batch)
        family.set_router_aux_loss(model, 0)
    assert added.loss == pytest.approx(float(plain + 0.5 * added.aux_loss), rel=1e-5)
    assert float(added.aux_loss) > 0.5


@pytest.mark.parametrize("name", ["one image", "two images", "many turns"])
def test_packed_vision_attention_equals_one_call_an_image(
    family: Ernie45VL, model: Any, name: str
) -> None:
    batch = family.collate([family.encode(CONVERSATIONS[name])] * 2)
    vision = model.config.vision_config

    def gradients(implementation: str) -> tuple[float, torch.Tensor]:
        vision._attn_implementation_internal = implementation
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        tower = model.model.vision_tower
        return float(loss), tower.blocks[0].attn.qkv.weight.grad.clone()

    loss, gradient = gradients("sdpa")
    packed_loss, packed_gradient = gradients(vision_attention.NAME)
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    assert torch.allclose(packed_gradient, gradient, atol=1e-6)
    assert float(gradient.abs().max()) > 1e-4


def test_patches_equal_those_of_the_image_processor(family: Ernie45VL) -> None:
    processor = family.processor.image_processor
    sizes = [(336, 56), (300, 50), (56, 56), (336, 56), (28, 28), (2000, 700)]
    images = [decode(image(*size)) for size in sizes]
    expected = processor(images=images, return_tensors="pt")
    found, grids = patches(images, processor)
    assert grids == [tuple(grid) for grid in expected["image_grid_thw"].tolist()]
    assert found.dtype == torch.uint8
    assert torch.equal(normalized(found, *mean_and_std(processor)), expected["pixel_values"])


def test_vision_indices_change_nothing(family: Ernie45VL, model: Any) -> None:
    batch = family.collate([family.encode(c) for c in CONVERSATIONS.values() if c.images])
    left_out = {k: v for k, v in batch.items() if k not in VISION_INDICES}
    assert len(left_out) == len(batch) - 2
    with torch.no_grad():
        assert float(model(**batch).loss) == float(model(**left_out).loss)
