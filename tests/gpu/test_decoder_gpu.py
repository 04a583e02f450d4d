"""Generation on a GPU: steps are captured as graphs, and answer as uncaptured ones and HF do."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from job import families
from job.engines.device import release_memory
from job.evaluation.decoding import decode_prompts
from job.evaluation.generate import generate
from job.families.base import SORTED_EXPERTS
from job.families.encoded import IGNORED
from job.families.ernie45_vl import Ernie45VL
from job.families.ernie45_vl.packed.decoder import PackedDecoder
from job.families.ernie45_vl.packed.model import packed_base
from job.families.gpu_memory import free_gpu_memory
from tests.unit.families.test_decoder import (
    GREEDY,
    NEW_TOKENS,
    SPEC,
    TINY,
    adapted_everywhere,
    prompts,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def family() -> Ernie45VL:
    return Ernie45VL.bind(families.read_checkpoint("builtin://ernie-vl-tiny", TINY), SPEC.data)


def loaded(family: Ernie45VL, dtype: torch.dtype, *, adapted: bool) -> Any:
    model = family.load(dtype=dtype, device=CUDA)
    family.set_experts_implementation(model, SORTED_EXPERTS)
    return adapted_everywhere(model) if adapted else model.eval()


def decoded(
    family: Ernie45VL, model: Any, *, slots: int, captured: bool
) -> tuple[list[list[int]], int]:
    """The answers, and the number of graphs."""
    base = packed_base(model)
    assert base is not None
    decoder = PackedDecoder(base, family.processor, slots=slots, capacity=600)
    graphs = decoder.graphs
    assert graphs is not None
    if not captured:
        decoder.graphs = None
    answers = decode_prompts(
        decoder,
        prompts(family),
        max_new_tokens=NEW_TOKENS,
        end_tokens=family.end_tokens,
        read_every=4,
    )
    return answers, graphs.captured


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("slots", [3, 8])
def test_captured_steps_answer_as_uncaptured_ones(
    family: Ernie45VL, slots: int, adapted: bool
) -> None:
    model = loaded(family, torch.bfloat16, adapted=adapted)
    expected, none = decoded(family, model, slots=slots, captured=False)
    found, graphs = decoded(family, model, slots=slots, captured=True)
    assert (none, graphs > 0) == (0, True)
    assert found == expected
    release_memory()


def test_answers_in_fp32_are_those_of_transformers(
    family: Ernie45VL, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where grouped products in fp32 wait for the device, nothing is captured, as a line says."""
    model = loaded(family, torch.float32, adapted=True)
    expected = [generate(model, family, [prompt], GREEDY)[0] for prompt in prompts(family)]
    found, graphs = decoded(family, model, slots=8, captured=True)
    assert found == expected
    assert (graphs == 0) == ("cannot be captured" in "".join(capsys.readouterr()))


def test_answers_in_bf16_differ_from_transformers_only_at_ties(family: Ernie45VL) -> None:
    model = loaded(family, torch.bfloat16, adapted=True)
    asked = prompts(family)
    expected = [generate(model, family, [prompt], GREEDY)[0] for prompt in asked]
    found, _ = decoded(family, model, slots=8, captured=True)
    equal = sum(map(list.__eq__, found, expected))
    print(f"{equal} of {len(asked)} answers are equal in bf16")
    base = packed_base(model)
    assert base is not None
    for prompt, ours, theirs in zip(asked, found, expected, strict=True):
        at = next(
            (i for i, both in enumerate(zip(ours, theirs, strict=False)) if both[0] != both[1]),
            None,
        )
        if at is None:
            continue
        decoder = PackedDecoder(base, family.processor, slots=1, capacity=600)
        decoder.graphs = None
        so_far = (*prompt.input_ids, *ours[:at])
        longer = replace(prompt, input_ids=so_far, labels=(IGNORED,) * len(so_far))
        with torch.inference_mode():
            logits = decoder.prefill([longer])
        best, other = logits[0, ours[at]].float(), logits[0, theirs[at]].float()
        # bf16 has 8 significant bits; every layer rounds.
        assert float(best - other) <= 8 * float(best.abs()) / 256, (prompt.id, at)
    assert equal >= len(asked) // 2


def test_memory_of_graphs_is_not_free() -> None:
    release_memory()
    before = free_gpu_memory(CUDA)
    pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    values = torch.ones(2**28, device=CUDA)  # 1 GiB
    with torch.cuda.graph(graph, pool=pool):
        values.add(1).sum()
    del values
    after = free_gpu_memory(CUDA)
    # The graph keeps its sum of 1 GiB; the values' own memory is kept for reuse.
    assert 2**30 <= before - after < 1.5 * 2**30
