"""The packed decoder generates what Transformers' `generate` does, token by token."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GenerationConfig

from job import families
from job.evaluation.decoding import decode_prompts
from job.evaluation.generate import generate, generate_all, is_plain_greedy
from job.evaluation.prompts import Question
from job.families.encoded import Encoded
from job.families.ernie45_vl import Ernie45VL
from job.families.ernie45_vl.packed.decoder import PackedDecoder
from job.families.ernie45_vl.packed.model import PackedErnie, packed_base
from job.families.packed_shape import PackedShape
from job.prep.images import inspect
from job.prep.rows import EncodedImage, Message, Part
from job.spec.load import load_spec
from tests.models import add_noise

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
SPEC = load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec
NEW_TOKENS = 24
GREEDY = replace(SPEC.eval.generation, max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def family() -> Ernie45VL:
    return Ernie45VL.bind(families.read_checkpoint("builtin://ernie-vl-tiny", TINY), SPEC.data)


@pytest.fixture
def model(family: Ernie45VL) -> Any:
    return family.load(dtype=torch.float32, device=torch.device("cpu"))


def image(seed: int, width: int, height: int) -> EncodedImage:
    pixels = torch.randint(256, (height // 4, width // 4), generator=torch.manual_seed(seed))
    drawn = Image.fromarray(pixels.byte().numpy()).resize((width, height)).convert("RGB")
    file = io.BytesIO()
    drawn.save(file, "PNG")
    return inspect(file.getvalue())


def questions() -> list[Question]:
    """With an image, two images, none, and an earlier answer; their answers differ in length."""
    write, or_ = Part(text="Write the formula."), Part(text="or")
    found = []
    for seed, (width, height) in enumerate([(336, 56), (112, 56), (56, 112), (224, 56), (84, 84)]):
        asked = (Message(role="user", parts=(Part(image=0), write)),)
        found.append(question(seed, asked, (image(seed, width, height),)))
    images = (image(7, 112, 56), image(8, 56, 56))
    two = Message(role="user", parts=(Part(image=0), or_, Part(image=1)))
    text = Message(role="user", parts=(Part(text="x + y"),))
    answered = Message(role="assistant", parts=(Part(text="x"),))
    found.append(question(5, (two,), images))
    found.append(question(6, (text,), ()))
    found.append(question(7, (two, answered, text), images))
    return found


def question(number: int, asked: tuple[Message, ...], images: tuple[EncodedImage, ...]) -> Question:
    return Question(id=f"{number}", row=number, turn=1, asked=asked, images=images, label="")


def prompts(family: Ernie45VL) -> list[Encoded]:
    return [family.encode_prompt(each.id, each.asked, each.images) for each in questions()]


def adapted_everywhere(model: Any) -> Any:
    """With adapters on some layers of each kind, and on the routed experts."""
    targets = ["q_proj", "v_proj", "gate_proj", "fc1"]
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, target_modules=targets, target_parameters=experts)
    model = get_peft_model(model, config)
    add_noise(model, 0.02)
    return model.eval()


@pytest.mark.parametrize(
    ("adapted", "slots"),
    [
        pytest.param(False, 3, id="base-3"),
        pytest.param(False, 8, id="base-8", marks=pytest.mark.slow),
        pytest.param(True, 3, id="adapter-3", marks=pytest.mark.slow),
        pytest.param(True, 8, id="adapter-8"),
    ],
)
def test_greedy_answers_are_those_of_transformers(
    adapted: bool, slots: int, family: Ernie45VL, model: Any
) -> None:
    if adapted:
        model = adapted_everywhere(model)
    model.eval()
    asked = prompts(family)
    expected = [generate(model, family, [prompt], GREEDY)[0] for prompt in asked]
    ended: list[int] = []
    found = generate_all(model, family, questions(), GREEDY, batch_size=slots, ended=ended.append)
    assert found == expected
    assert sum(ended) == len(asked)
    assert len({len(answer) for answer in found}) > 1  # rows ended at different steps
    base = model.get_base_model() if adapted else model
    assert type(base) is PackedErnie  # it was the decoder that answered
    # The swapped classes leave Transformers' generation as it was.
    assert generate(model, family, asked[:1], GREEDY) == expected[:1]


def test_steps_of_fixed_shapes_read_late_change_no_answer(family: Ernie45VL, model: Any) -> None:
    """As on a GPU, where these steps are captured: free slots and free tokens are masked."""
    model = adapted_everywhere(model)
    asked = prompts(family)
    expected = [generate(model, family, [prompt], GREEDY)[0] for prompt in asked]
    base = packed_base(model)
    assert base is not None
    built = PackedDecoder(base, family.processor, slots=3, capacity=600, fixed_shapes=True)
    shapes = set()
    step = built._step

    def recorded(rows: int, visible: int) -> torch.Tensor:
        shapes.add((rows, visible))
        return step(rows, visible)

    built._step = recorded  # type: ignore[method-assign]
    found = decode_prompts(
        built,
        asked,
        max_new_tokens=NEW_TOKENS,
        end_tokens=family.end_tokens,
        read_every=8,
    )
    assert found == expected
    assert {rows for rows, _ in shapes} == {3, 1}
    assert {length for _, length in shapes} == {320}  # half of the capacity, and aligned


def test_an_image_that_is_asked_about_several_times_is_computed_once(
    family: Ernie45VL, model: Any
) -> None:
    """As in reinforcement, which generates several answers to each question."""
    first, second = prompts(family)[:2]
    expected = [generate(model, family, [prompt], GREEDY)[0] for prompt in (first, second)]
    base = packed_base(model)
    assert base is not None
    built = PackedDecoder(base, family.processor, slots=6, capacity=600)
    computed: list[int] = []
    model.model.vision_tower.blocks[0].register_forward_pre_hook(
        lambda module, given: computed.append(len(given[0]))
    )
    found = decode_prompts(
        built,
        [first, first, second, first, second, second],
        max_new_tokens=NEW_TOKENS,
        end_tokens=family.end_tokens,
        read_every=8,
    )
    assert found == [expected[n] for n in (0, 0, 1, 0, 1, 1)]
    patches = [PackedShape.of([family.row_size(each)]).patches for each in (first, second)]
    assert computed == [sum(patches)]


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({}, True),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.8}, True),  # the spec decides
        ({"repetition_penalty": 1.05}, False),
        ({"num_beams": 4}, False),
        ({"suppress_tokens": [5]}, False),
    ],
)
def test_settings_of_the_model_that_change_greedy_answers_are_left_to_transformers(
    settings: dict[str, Any], plain: bool
) -> None:
    assert is_plain_greedy(GenerationConfig(**settings), GREEDY) is plain
    assert not is_plain_greedy(GenerationConfig(**settings), replace(GREEDY, do_sample=True))


def test_a_model_whose_class_was_changed_is_left_to_transformers(
    family: Ernie45VL, model: Any
) -> None:
    class Patched(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Patched
    assert not family.has_decoder(model)
    assert not family.try_packed_step(model)
