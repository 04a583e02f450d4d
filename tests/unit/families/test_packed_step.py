"""The packed training step has the losses and gradients of the padded one."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from job import families
from job.engines.transformers import TransformersEngine
from job.families import loss as loss_module
from job.families.base import SORTED_EXPERTS
from job.families.ernie45_vl import Ernie45VL
from job.families.ernie45_vl.packed.batch import pack
from job.families.ernie45_vl.packed.experts import Modalities, moe_block
from job.families.ernie45_vl.packed.layers import PackedDecoderLayer, PackedVisionBlock
from job.families.ernie45_vl.packed.model import PackedErnie, use_packed_step
from job.families.ernie45_vl.packed.varlen_attention import PackedSequences, gather
from job.families.lora.gate_up import (
    GateUpWrapper,
    use_gate_up,
    wrapped_parameters,
    zero_outside_blocks,
)
from job.families.lora.linear import use_lora_linear
from job.prep.images import inspect
from job.prep.rows import EncodedImage, Message, Part, Row
from job.spec.load import load_spec
from job.train.micro_batches import Split, balanced, in_order, sorted_by_length

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
TARGETS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "fc1",
    "fc2",
    "qkv",
    "attn.proj",
]
GATE_UP = "experts.gate_up_proj"
EXPERTS = [GATE_UP, "experts.down_proj"]


@pytest.fixture(scope="module")
def family() -> Ernie45VL:
    spec = load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec
    return Ernie45VL.bind(families.read_checkpoint("builtin://ernie-vl-tiny", TINY), spec.data)


@pytest.fixture(scope="module")
def plain(family: Ernie45VL) -> Any:
    model = family.initialize(seed=3, dtype=torch.float32, device=torch.device("cpu"))
    model.set_experts_implementation("eager")
    return model


def image(width: int, height: int) -> EncodedImage:
    file = io.BytesIO()
    Image.effect_noise((width, height), 64).convert("RGB").save(file, "PNG")
    return inspect(file.getvalue())


def row(answer: str, *images: EncodedImage) -> Row:
    parts = tuple(Part(image=number) for number in range(len(images)))
    question = Message(role="user", parts=(*parts, Part(text="Read.")))
    reply = Message(role="assistant", parts=(Part(text=answer),))
    return Row(id=answer, messages=(question, reply), images=images)


BATCHES = {
    "one row": [row("x^{2}", image(112, 56))],
    "equal images": [row("a", image(112, 56)), row(r"\frac{a}{b}+c", image(112, 56))],
    "mixed images": [
        row("a+b", image(170, 56)),
        row(r"\int x", image(60, 90)),
        row("b", image(56, 56)),
    ],
    "several images and none": [row("a", image(60, 60), image(200, 30)), row("no image")],
    "no image at all": [row("a"), row("b+c")],
}


def adapted(model: Any, *, packed: bool, experts: bool, checkpointing: bool = False) -> Any:
    """The model with a LoRA adapter that already does something, ready to train."""
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(model)
    if packed:
        use_packed_step(model)
        Ernie45VL.set_experts_implementation(model, SORTED_EXPERTS)
    torch.manual_seed(5)
    # As in jobs, gate and up of routed experts have an adapter each.
    config = LoraConfig(
        r=4,
        target_modules=TARGETS,
        target_parameters=EXPERTS if experts else None,
        rank_pattern={GATE_UP: 8} if experts else {},
        alpha_pattern={GATE_UP: 16} if experts else {},
        init_lora_weights=False,
    )
    model = get_peft_model(model, config)
    use_gate_up(model, [name for name, _ in wrapped_parameters(model) if name.endswith(GATE_UP)])
    for module in model.modules():
        if isinstance(module, GateUpWrapper):
            zero_outside_blocks(module.lora_B["default"].weight.data)
    if packed:
        assert use_lora_linear(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def step(model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=5e-6, msg=lambda text: f"{what}: {text}"
    )


def same(models: list[Any], family: Ernie45VL, rows: list[Row]) -> None:
    """The plain and the packed model take one step on the rows, with one outcome."""
    plain, packed = models
    encoded = [family.encode(each) for each in rows]
    loss, grads = step(plain, family.collate(encoded))
    packed_loss, packed_grads = step(packed, pack(encoded, family.processor))
    near(packed_loss, loss, "loss")
    # Transformers gives zeros, here nothing, to adapters of experts that no token asked for.
    assert packed_grads.keys() <= grads.keys()
    assert any(float(grad.abs().max()) > 1e-4 for grad in grads.values())
    for name, grad in grads.items():
        near(packed_grads.get(name, torch.zeros_like(grad)), grad, name)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("experts", [False, True], ids=["reference targets", "routed experts"])
def test_losses_and_gradients_equal_the_plain_step(
    family: Ernie45VL, plain: Any, name: str, experts: bool
) -> None:
    models = [adapted(plain, packed=packed, experts=experts) for packed in (False, True)]
    same(models, family, BATCHES[name])


def test_the_router_s_auxiliary_loss_equals_the_plain_one(family: Ernie45VL, plain: Any) -> None:
    models = [adapted(plain, packed=packed, experts=False) for packed in (False, True)]
    for model in models:
        family.set_router_aux_loss(model.get_base_model(), 0.5)
    same(models, family, BATCHES["mixed images"])


def test_gradient_checkpointing_changes_nothing(family: Ernie45VL, plain: Any) -> None:
    models = [
        adapted(plain, packed=packed, experts=False, checkpointing=packed)
        for packed in (False, True)
    ]
    same(models, family, BATCHES["mixed images"])


def test_a_loss_in_chunks_equals_the_whole(
    family: Ernie45VL, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 3)
    models = [adapted(plain, packed=packed, experts=False) for packed in (False, True)]
    same(models, family, BATCHES["mixed images"])


@pytest.mark.parametrize("trained", [False, True], ids=["a frozen head", "a trained head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_of_a_head_is_the_cross_entropy_of_all_its_logits(
    trained: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 3)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40, bias=False, dtype=dtype).requires_grad_(trained)
    hidden = torch.randn(8, 16).to(dtype).requires_grad_()
    targets = torch.randint(40, (8,))
    found = loss_module.supervised_loss(hidden, targets, head)
    [gradient] = torch.autograd.grad(0.3 * found, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact @ head.weight.double().T, targets)
    [wanted] = torch.autograd.grad(0.3 * expected, exact)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    assert float((gradient.double() - wanted).norm() / wanted.norm()) < tolerance
    with torch.no_grad():
        assert float(loss_module.supervised_loss(hidden, targets, head)) == pytest.approx(
            float(found.detach()), rel=tolerance
        )


def test_all_weights_of_a_full_fine_tuning_get_the_plain_gradients(
    family: Ernie45VL, plain: Any
) -> None:
    models = [copy.deepcopy(plain).requires_grad_(True).train() for _ in range(2)]
    use_packed_step(models[1])
    same(models, family, BATCHES["several images and none"])


def test_a_model_with_the_packed_step_still_answers_as_before(
    family: Ernie45VL, plain: Any
) -> None:
    model = copy.deepcopy(plain)
    use_packed_step(model)
    family.set_experts_implementation(model, SORTED_EXPERTS)
    assert isinstance(model, PackedErnie)
    assert isinstance(model.model.language_model.layers[1], PackedDecoderLayer)
    assert isinstance(model.model.vision_tower.blocks[0], PackedVisionBlock)
    encoded = [family.encode(each) for each in BATCHES["mixed images"]]
    prompts = family.collate_prompts(encoded)
    answers = [
        each.generate(**prompts, max_new_tokens=6, do_sample=False) for each in (plain, model)
    ]
    assert torch.equal(*answers)


def test_rows_do_not_see_each_other(family: Ernie45VL, plain: Any) -> None:
    model = copy.deepcopy(plain)
    use_packed_step(model)
    first, second = (family.encode(each) for each in BATCHES["mixed images"][:2])
    alone = [float(model(**pack([each], family.processor)).loss) for each in (first, second)]
    together = float(model(**pack([first, second], family.processor)).loss)
    counts = [each.supervised_tokens for each in (first, second)]
    mean = sum(a * c for a, c in zip(alone, counts, strict=True)) / sum(counts)
    assert together == pytest.approx(mean, rel=1e-5)


def test_a_step_divided_by_length_has_the_loss_of_one_in_order(
    family: Ernie45VL, plain: Any
) -> None:
    model = copy.deepcopy(plain)
    use_packed_step(model)
    answers = ["a", "b+c", "x" * 40, "y", "z" * 20, "c", "d" * 9, "e"]
    encoded = [family.encode(row(answer, image(84, 56))) for answer in answers]
    lengths = [len(each.input_ids) for each in encoded]

    def loss(cut: Split) -> float:
        """The mean over the supervised tokens of all passes."""
        total, counted = 0.0, 0
        for piece in cut(range(len(encoded)), 2, 2):
            rows = [encoded[number] for number in piece]
            tokens = sum(each.supervised_tokens for each in rows)
            with torch.no_grad():
                total += float(model(**pack(rows, family.processor)).loss) * tokens
            counted += tokens
        return total / counted

    tokens_alike = balanced(2, lengths, [0] * 8)
    assert tokens_alike(range(8), 2, 2) != in_order(2)(range(8), 2, 2)
    for cut in (tokens_alike, sorted_by_length(2, lengths)):
        assert loss(cut) == pytest.approx(loss(in_order(2)), abs=1e-5)


def test_a_job_takes_the_sorted_experts_on_a_gpu_and_a_loop_on_a_cpu(
    family: Ernie45VL, plain: Any
) -> None:
    spec = load_spec(Path("specs/latex.yaml").read_text(), "latex.yaml", environ={}).spec
    for device, expected in (("cuda", SORTED_EXPERTS), ("cpu", "eager")):
        engine = TransformersEngine(
            model=spec.model, dtype=torch.float32, autocast=False, device=torch.device(device)
        )
        model = engine.prepare(copy.deepcopy(plain), family)
        experts = model.model.language_model.layers[1].mlp.text_moe.experts
        assert experts.config._experts_implementation == expected


class Operations(TorchDispatchMode):
    """The names of all that is computed, backwards too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_what_is_just_made_is_not_copied_and_gradients_of_distinct_places_do_not_add(
    plain: Any,
) -> None:
    model = adapted(plain, packed=True, experts=False).get_base_model()
    block = model.model.language_model.layers[1].mlp
    hidden = torch.randn(7, 256, requires_grad=True)
    modalities = Modalities.of(torch.tensor([False, True, True, False, True, False, False]))
    with Operations() as operations:
        output, logits = moe_block(block, hidden, modalities)
        assert logits is not None
        grid = PackedSequences.of([2, 4, 1]).pad(output[:, None])
        (grid.sum() + logits.square().sum()).backward()
    assert "aten.index_copy_.default" in operations.names
    costly = {"aten.index_copy.default", "aten.index.Tensor", "aten._index_put_impl_.default"}
    assert not costly & operations.names


def test_padding_and_packing_undo_each_other() -> None:
    sequences = PackedSequences.of([2, 4, 1])
    packed = torch.randn(7, 3, 5)
    grid = sequences.pad(packed)  # (3, 3, 4, 5)
    assert grid.shape == (3, 3, 4, 5)
    assert torch.equal(sequences.unpad(grid), packed)
    assert float(grid[0, :, 2:].abs().max()) == 0


def test_the_gradient_of_taking_is_that_of_an_index() -> None:
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([4, 0, 5])
    assert torch.autograd.gradcheck(lambda v: gather(v, places), values)
