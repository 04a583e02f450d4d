"""The estimate of memory is what steps keep, weights weigh, and a GPU once measured."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import memory as benchmarks
from benchmarks.training import tiny_family
from job import families
from job.engines import memory
from job.engines.device import Accelerator, Kind
from job.engines.lora_config import lora_config
from job.engines.memory import OPTIMIZER_STATE_BYTES, weight_bytes
from job.families.activation_memory import VARLEN, ActivationMemory, StepSettings
from job.families.base import SORTED_EXPERTS
from job.families.encoded import RowSize
from job.families.ernie45_vl import Ernie45VL
from job.families.lora.linear import use_lora_linear
from job.prep.images import inspect
from job.prep.rows import Message, Part, Row
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests.jobs import ROOT

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
H200 = Accelerator(kind="cuda", name="NVIDIA H200", memory_bytes=140 * 2**30)
CPU = Accelerator(kind="cpu", name="CPU", memory_bytes=2**34)
MEASURED = json.loads((ROOT / "benchmarks/results/memory-28b-h200.json").read_text())


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_spec((ROOT / "specs/latex.yaml").read_text(), "latex", environ={}).spec


@pytest.fixture(scope="module")
def family(spec: JobSpec) -> Ernie45VL:
    return Ernie45VL.bind(families.read_checkpoint("builtin://ernie-vl-tiny", TINY), spec.data)


def published() -> Any:
    """The architecture of ERNIE-4.5-VL-28B-A3B."""
    spec = (ROOT / "specs/ernie-4.5-vl-28b-latex.yaml").read_text()
    return families.architecture(load_spec(spec, "ernie", environ={}).spec.model)[1]


def estimate(
    model: Any, spec: JobSpec, rows: Sequence[RowSize], device: Accelerator
) -> memory.MemoryEstimate:
    """The estimate of a family that can tell."""
    found = memory.estimate(Ernie45VL, model, spec, rows, device)
    assert found is not None
    return found


def row(answer: str, *sizes: tuple[int, int]) -> Row:
    images = []
    for size in sizes:
        file = io.BytesIO()
        Image.new("L", size).save(file, "PNG")
        images.append(inspect(file.getvalue()))
    question = Message(
        role="user", parts=(*(Part(image=n) for n in range(len(sizes))), Part(text="Read."))
    )
    reply = Message(role="assistant", parts=(Part(text=answer),))
    return Row(id=answer, messages=(question, reply), images=tuple(images))


UNEQUAL = [row("a+b", (336, 56)), row(r"\frac a b" * 20, (168, 112)), row("x", (84, 84))]
EQUAL = [row("x^{2}", (112, 56))] * 3
LARGE = [row(r"\alpha" * 60, (280, 280)), row(r"\alpha" * 90, (280, 140))]
SHORT = RowSize(tokens=300, image_tokens=60, supervised_tokens=90, patches=(240,))
NO_PICTURE = [row("a b c d e f"), row("b+c")]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: list[Row]
    packed: bool = True
    checkpointing: bool = False
    experts: str = "eager"
    attention: str = "sdpa"
    autocast: bool = False
    dtype: torch.dtype = torch.float32
    method: str = "lora"
    targets: tuple[str, ...] | None = None
    adapt_experts: bool = False
    dropout: float = 0

    @property
    def lora_linear(self) -> bool:
        return not self.dropout and not self.autocast


CASES = {
    "rows of unequal length": Case(rows=UNEQUAL),
    "equal rows, which need no padded copies": Case(rows=EQUAL),
    "large pictures": Case(rows=LARGE),
    "no picture": Case(rows=NO_PICTURE),
    "grouped experts": Case(rows=UNEQUAL, experts="grouped_mm"),
    "sorted experts": Case(rows=UNEQUAL, experts=SORTED_EXPERTS),
    "padded": Case(rows=UNEQUAL, packed=False),
    "padded, grouped experts": Case(rows=LARGE, packed=False, experts="grouped_mm"),
    "eager attention": Case(rows=LARGE, packed=False, attention="eager"),
    "attention alone adapted": Case(rows=UNEQUAL, targets=ATTENTION),
    "the tower alone adapted": Case(rows=UNEQUAL, targets=("fc1", "fc2")),
    "attention of the tower alone adapted": Case(rows=UNEQUAL, targets=("qkv", "attn.proj")),
    "routed experts adapted": Case(rows=UNEQUAL, adapt_experts=True),
    "sorted experts adapted, padded": Case(
        rows=UNEQUAL, packed=False, adapt_experts=True, experts=SORTED_EXPERTS
    ),
    "sorted experts adapted": Case(rows=UNEQUAL, adapt_experts=True, experts=SORTED_EXPERTS),
    "bf16 weights, sorted experts": Case(rows=LARGE, dtype=torch.bfloat16, experts=SORTED_EXPERTS),
    "dropout": Case(rows=UNEQUAL, dropout=0.1),
    "all weights trained": Case(rows=UNEQUAL, method="full"),
    "bf16 weights": Case(rows=LARGE, dtype=torch.bfloat16),
    "autocast over bf16 weights": Case(rows=LARGE, dtype=torch.bfloat16, autocast=True),
    "checkpointing": Case(rows=LARGE, checkpointing=True),
    "checkpointing, padded": Case(rows=LARGE, checkpointing=True, packed=False),
    "checkpointing, all weights trained": Case(rows=LARGE, checkpointing=True, method="full"),
}


def kept_by_a_step(family: Ernie45VL, spec: JobSpec, case: Case) -> Counter[str]:
    """Bytes of the tensors that a real forward pass saves, by the decoder layer or block."""
    model = family.initialize(
        seed=3,
        dtype=case.dtype,
        device=torch.device("cpu"),
        attn_implementation=case.attention,
    )
    family.set_experts_implementation(model, case.experts)
    if case.packed:
        family.use_packed_step(model)
    targets = family.lora_targets(model, lora(spec, case).lora)
    model.requires_grad_(case.method == "full")
    if case.method == "lora":
        from peft import get_peft_model

        settings = replace(lora(spec, case).lora, lora_dropout=case.dropout)
        model = get_peft_model(model, lora_config(targets, settings))
        if case.lora_linear:
            use_lora_linear(model)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    place: list[str] = [""]
    kept: Counter[str] = Counter()
    alive = []  # or an address would be given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(storage)
            kept[place[-1]] += storage.nbytes()
        return tensor

    for name, module in model.named_modules():
        if name.rpartition(".")[2].isdigit():
            module.register_forward_pre_hook(lambda *_, n=name: place.append(n))
            module.register_forward_hook(lambda *_: place.pop() and None)
    encoded = [family.encode(each) for each in case.rows]
    batch = family.pack(encoded) if case.packed else family.collate(encoded)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=case.autocast),
    ):
        model.train()(**batch, use_cache=False)
    if case.checkpointing:  # the rotary tables, held by closures, where no hook sees them
        head = family.meta_model().config.text_config.head_dim
        kept["closures"] = 2 * batch["position_ids"][0].numel() * head * 4
    return kept


def lora(spec: JobSpec, case: Case) -> JobSpec:
    changed = replace(
        spec.lora,
        method=case.method,  # type: ignore[arg-type]
        target_modules=case.targets,
        finetune_experts=case.adapt_experts,
    )
    return replace(spec, lora=changed)


def estimated(family: Ernie45VL, spec: JobSpec, case: Case) -> ActivationMemory:
    skeleton = family.meta_model()
    full = case.method == "full"
    targets = family.lora_targets(skeleton, lora(spec, case).lora)
    trained = {*targets.modules, *targets.parameters}
    if full:
        trained = {name for name, _ in (*skeleton.named_modules(), *skeleton.named_parameters())}
    return family.activation_memory(
        skeleton.config,
        trained,
        [family.row_size(family.encode(each)) for each in case.rows],
        StepSettings(
            itemsize=case.dtype.itemsize,
            autocast=case.autocast,
            lora_linear=case.lora_linear,
            packed=case.packed,
            checkpointing=case.checkpointing,
            attention=case.attention,
            experts=case.experts,
            rank=0 if full else spec.lora.r,
            gate_up_adapters=2,
            dropout=4 if case.dropout else 0,
        ),
    )


@pytest.mark.parametrize("name", CASES)
def test_what_a_step_keeps_is_estimated_within_five_percent(
    name: str, family: Ernie45VL, spec: JobSpec
) -> None:
    measured = kept_by_a_step(family, spec, CASES[name]).total()
    assert estimated(family, spec, CASES[name]).after_forward == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("packed", [True, False])
def test_what_checkpointing_makes_again_is_the_largest_layer(
    packed: bool, family: Ernie45VL, spec: JobSpec
) -> None:
    case = Case(rows=LARGE, packed=packed)
    layers = kept_by_a_step(family, spec, case)
    largest = max(size for name, size in layers.items() if name)
    found = estimated(family, spec, replace(case, checkpointing=True))
    # The first layer's figure holds the rotary tables and the mask, which all layers share.
    assert found.recomputed == pytest.approx(largest, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_weigh_what_is_told_to_the_byte(dtype: torch.dtype, family: Ernie45VL) -> None:
    model = family.initialize(seed=0, dtype=dtype, device=torch.device("cpu"))
    real = sum(parameter.nbytes for parameter in model.parameters())
    assert weight_bytes(Ernie45VL, family.meta_model(), dtype.itemsize) == real


def test_published_weights_weigh_what_is_known_of_them() -> None:
    found = weight_bytes(Ernie45VL, published(), 2)
    assert found / 2**30 == pytest.approx(54.8, abs=0.05)


def test_adapter_gradients_and_optimizer_weigh_what_those_of_a_step_do(
    family: Ernie45VL, spec: JobSpec
) -> None:
    from peft import LoraConfig, get_peft_model

    model = family.initialize(seed=0, dtype=torch.float32, device=torch.device("cpu"))
    targets = family.lora_targets(model, spec.lora)
    adapted = get_peft_model(model, LoraConfig(r=spec.lora.r, target_modules=list(targets.modules)))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    size = family.row_size(family.encode(EQUAL[0]))
    found = estimate(family.meta_model(), spec, [size], CPU)
    assert found.adapter == sum(p.nbytes for p in trained)
    assert found.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert found.optimizer == sum(t.nbytes for t in states)


def test_every_optimizer_of_the_spec_has_its_size() -> None:
    from job.spec import keys

    node = keys.at(("train", "optim"))
    assert node is not None
    assert set(OPTIMIZER_STATE_BYTES) == set(node["enum"])


@pytest.mark.parametrize("name", MEASURED["configurations"])
def test_peaks_of_training_on_a_gpu_at_full_size_are_estimated(name: str) -> None:
    settings = benchmarks.settings(benchmarks.CONFIGURATIONS[name])
    _, sizes = benchmarks.heaviest(settings, tiny_family(settings))
    found = estimate(published(), settings, sizes, H200)
    peak = MEASURED["configurations"][name]["measured_gib"]
    assert found.total / 2**30 == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("kind", "bounded", "kernel"),
    [
        ("cuda", None, VARLEN),
        ("rocm", None, "sdpa"),
        ("rocm", True, VARLEN),
        ("cuda", False, "sdpa"),
        ("cpu", True, "sdpa"),
    ],
)
def test_attention_is_estimated_as_the_trial_found_and_else_as_measured(
    kind: Kind, *, bounded: bool | None, kernel: str
) -> None:
    settings = benchmarks.settings(
        benchmarks.CONFIGURATIONS[next(iter(MEASURED["configurations"]))]
    )
    settings = replace(settings, model=replace(settings.model, dtype="bfloat16"))
    step = memory._step(Ernie45VL, settings, replace(H200, kind=kind), bounded)
    assert step.attention == kernel


def test_attention_by_boundaries_keeps_no_grid(family: Ernie45VL, spec: JobSpec) -> None:
    def attention(rows: list[Row], kernel: str) -> int:
        case = Case(rows=rows, dtype=torch.bfloat16, attention=kernel)
        return estimated(family, spec, case).attention

    assert attention(EQUAL, VARLEN) == attention(EQUAL, "sdpa"), "which is no grid either"
    assert attention(UNEQUAL, VARLEN) < 0.6 * attention(UNEQUAL, "sdpa")


def test_a_base_in_4_bits_weighs_what_is_packed_and_what_is_not() -> None:
    text = (ROOT / "specs/ernie-4.5-vl-28b-latex.yaml").read_text()
    model = published()
    card = Accelerator(kind="cuda", name="24 GB", memory_bytes=int(24 * 2**30 * 0.98))
    rows = [RowSize(tokens=146, image_tokens=80, supervised_tokens=40, patches=(320,))] * 2
    found = {
        four: estimate(
            model,
            load_spec(
                text,
                "x",
                [f"model.load_in_4bit={four}", "lora.finetune_experts=false"],
                environ={},
            ).spec,
            rows,
            card,
        )
        for four in ("true", "false")
    }
    largest = max(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert found["true"].weights < 0.3 * found["false"].weights
    assert found["true"].working - found["false"].working == int(largest * (2 + 4 / 64))
    assert found["true"].optimizer == found["false"].optimizer > 0
    assert found["true"].is_safe(card.memory_bytes)
    assert found["false"].is_ruled_out(card.memory_bytes)


def test_processes_divide_weights_gradients_and_states_that_are_sharded() -> None:
    text = (ROOT / "specs/ernie-4.5-vl-28b-latex.yaml").read_text()
    given = ["lora={method: full}", "model.dtype=auto", "train.optim=auto"]
    model, rows = published(), [SHORT]
    alone = load_spec(text, "ernie", given, environ={}).spec
    sharded = load_spec(text, "ernie", [*given, "runtime.distributed=fsdp2"], environ={}).spec
    whole = estimate(model, alone, rows, H200)
    assert not whole.fits(H200.memory_bytes)
    copies = 2 * sum(parameter.numel() for parameter in model.parameters())
    for processes in (1, 4, 8):
        found = memory.estimate(Ernie45VL, model, sharded, rows, H200, processes=processes)
        assert found is not None
        assert found.weights == pytest.approx((whole.weights - copies) / processes, rel=1e-6)
        assert found.gradients == pytest.approx(whole.gradients / processes, rel=1e-6)
        assert found.optimizer == pytest.approx(whole.optimizer / processes, rel=1e-6)
        assert found.activations == whole.activations
        assert found.weights < found.loading - found.context < found.weights + 8 * 2**30
        assert found.fits(H200.memory_bytes) == (processes > 1)


def test_processes_divide_the_frozen_weights_and_the_adapter_that_are_sharded() -> None:
    text = (ROOT / "specs/ernie-4.5-vl-28b-latex.yaml").read_text()
    model, rows, processes = published(), [SHORT], 8
    given = ["train.optim=auto", "train.gradient_accumulation_steps=1"]
    whole = estimate(model, load_spec(text, "ernie", given, environ={}).spec, rows, H200)

    def found(*more: str) -> memory.MemoryEstimate:
        settings = [*given, "runtime.distributed=fsdp2", *more]
        spec = load_spec(text, "ernie", settings, environ={}).spec
        result = memory.estimate(Ernie45VL, model, spec, rows, H200, processes=processes)
        assert result is not None
        return result

    sharded = found()
    assert sharded.weights == pytest.approx(whole.weights / processes, rel=1e-6)
    assert sharded.gradients == pytest.approx(whole.gradients / processes, rel=1e-6)
    assert sharded.optimizer == pytest.approx(whole.optimizer / processes, rel=1e-6)
    copy = whole.gradients // 2  # in bf16, which layers compute with
    assert sharded.adapter == pytest.approx((whole.adapter - copy) / processes + copy, rel=1e-6)
    assert sharded.activations == whole.activations
    gathered = sharded.working - whole.working
    assert whole.weights / 28 < gathered < whole.weights / 8
    assert sharded.total < whole.total - whole.weights / 2
    # Until the last of several passes, an adapter's gradients are not divided.
    assert found("train.gradient_accumulation_steps=2").gradients == whole.gradients


def test_a_process_loads_its_shards_and_stacks_experts_or_loads_all_random_weights() -> None:
    text = (ROOT / "specs/ernie-4.5-vl-28b-latex.yaml").read_text()
    given = ["lora={method: full}", "model.dtype=auto", "train.optim=auto"]
    model, sharded = published(), "runtime.distributed=fsdp2"
    read, random = (
        memory.estimate(
            Ernie45VL,
            model,
            load_spec(text, "ernie", [*given, sharded, f"model.init={init}"], environ={}).spec,
            [SHORT],
            H200,
            processes=8,
        )
        for init in ("pretrained", "random")
    )
    assert read is not None
    assert random is not None
    assert random.loading == pytest.approx(8 * read.weights + read.context, rel=1e-6)
    assert not random.fits(random.loading - 1)
    stored_together = tuple(
        f"layers.1.mlp.{modality}_moe.experts.gate_up_proj" for modality in ("text", "vision")
    )
    experts = [p.numel() for n, p in model.named_parameters() if n.endswith(stored_together)]
    assert len(experts) == 2
    assert read.loading == read.weights + read.context + 3 * 4 * sum(experts)
