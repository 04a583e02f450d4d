"""The counted operations of a step are those that PyTorch counts when it runs one."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import SPEC, encoded_rows
from job import families
from job.engines.peak_flops import peak_tflops
from job.families.encoded import RowSize
from job.families.step_flops import ForwardFlops, forward_flops, training_flops
from job.spec.load import load_spec
from tests.jobs import ROOT

TINY = ROOT / "job" / "families" / "builtin" / "ernie-vl-tiny"


def test_ernie_vl_s_operations_are_those_of_its_forward_pass() -> None:
    spec = load_spec(SPEC.read_text(), "latex.yaml", environ={}).spec
    family: Any = families.bind(
        families.read_checkpoint("builtin://ernie-vl-tiny", TINY), spec.model, spec.data
    )
    model = family.initialize(
        seed=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attn_implementation="eager",
    )
    family.set_experts_implementation(model, "eager")
    rows = encoded_rows(family, 1)
    sizes = [family.row_size(row) for row in rows]
    counted = family.forward_flops(model, sizes)
    batch = family.collate(rows)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)
    # That pass computes all scores, masked or not, and logits of all tokens.
    text, [size] = model.config.text_config, sizes
    scores = 2 * text.num_hidden_layers * size.tokens**2
    scores *= text.num_attention_heads * text.head_dim
    logits = 2 * (size.tokens - size.supervised_tokens) * text.hidden_size * text.vocab_size
    total = counted.vision + counted.language + scores + logits
    assert counter.get_total_flops() == pytest.approx(total, rel=0.03)


def a_text_model(**more: int) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

    shapes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    config: Any = Qwen3MoeConfig(**shapes, **more) if more else Qwen2Config(**shapes)
    return AutoModelForCausalLM.from_config(config)


def rows_of(*tokens: int) -> Sequence[RowSize]:
    return [RowSize(tokens=n, image_tokens=0, supervised_tokens=n, patches=()) for n in tokens]


def test_any_text_model_s_operations_are_those_of_its_forward_pass() -> None:
    model = a_text_model()
    model.set_attn_implementation("eager")
    counted = forward_flops(model, rows_of(96))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 96, dtype=torch.long), use_cache=False)
    scores = 2 * 2 * 96**2 * 64  # causal: half of what that pass computes
    assert counter.get_total_flops() == pytest.approx(counted.language + scores, rel=0.01)
    assert counted.vision == 0


def test_of_routed_experts_the_chosen_ones_count() -> None:
    moe = {"num_experts": 8, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    two, four = (
        forward_flops(a_text_model(**moe, num_experts_per_tok=chosen), rows_of(10)).language
        for chosen in (2, 4)
    )
    assert four - two == 2 * 10 * 2 * 2 * 3 * 64 * 32  # rows, layers, experts, matrices


def test_gradients_reach_the_vision_tower_only_if_it_is_trained() -> None:
    forward = ForwardFlops(vision=10, language=100)
    assert training_flops(forward, ["language attention"]) == 10 + 200
    assert training_flops(forward, ["language attention", "vision mlp"]) == 20 + 200
    assert training_flops(forward, None) == 30 + 300


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 5090", None),
        ("Intel(R) Xeon(R) Processor", None),
    ],
)
def test_a_gpu_s_peak_is_known_by_the_name_that_its_driver_gives(
    name: str, peak: float | None
) -> None:
    assert peak_tflops(name) == peak


def test_a_partition_has_its_share_of_the_peak() -> None:
    assert peak_tflops("AMD Instinct MI300X", 38) == pytest.approx(1307.4 / 8)
