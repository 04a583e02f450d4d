"""A real vLLM serves what the families `vlm` and `llm` export: merged weights, and an adapter."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from job import engines, families
from job.engines.device import Accelerator
from job.errors import ProofError
from job.export import serving
from job.export.merged import Merge
from job.export.proof import Outputs, outputs
from job.prep import formulas
from job.prep.images import inspect
from job.prep.records import Message, Part, Row
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests.models import BUILDERS

ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ROUNDING = 0.05  # of log-probabilities, by fp16
SPECS = {"qwen_vl": "specs/latex.yaml", "qwen3": "specs/text.yaml", "llama": "specs/text.yaml",
         "idefics3": "specs/latex.yaml"}  # fmt: skip

pytestmark = [
    pytest.mark.serving,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        serving.PYTHON not in os.environ, reason="needs `make test-serving`, which has a vLLM"
    ),
]


@dataclass(frozen=True)
class Served:
    """A base with an adapter beside it, the vLLM that serves them, and what both say."""

    server: serving.Server
    family: families.Family
    rows: list[Row]
    base_says: Outputs
    adapter_says: Outputs


@pytest.fixture(scope="module", params=SPECS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    kind = str(request.param)
    place = tmp_path_factory.mktemp(kind)
    BUILDERS[kind](place / "model")
    settings = [f"model.model_name_or_path={place / 'model'}", "model.init=pretrained"]
    spec = load_spec(
        Path(SPECS[kind]).read_text(),
        SPECS[kind],
        [*settings, "lora.finetune_vision_layers=false", "lora.finetune_mlp_modules=true"],
        environ={},
    ).spec
    checkpoint = families.read_checkpoint(kind, place / "model")
    family = families.bind(checkpoint, spec.model, spec.data)
    accelerator = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
    engine = engines.create(spec.model, spec.lora, accelerator)
    rows = [_row(spec, number, family) for number in range(4)]
    base = engine.load(family)
    base_says = outputs(base, family, rows)
    family.save(
        base,
        Merge(base, dtype=torch.float16, keeps_fp32=family.keeps_fp32).tensors(),
        place / "merged",
        dtype=torch.float16,
        max_shard_size=spec.export.merged.max_shard_size,
        layout="vllm",
    )
    model = engine.attach_adapter(base, family.lora_targets(base, spec.lora), spec.lora, 5)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    adapter_says = outputs(model.eval(), family, rows)
    model.save_pretrained(place / "adapter")
    family.write_served_adapter(place / "adapter", place / "adapter-vllm")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ON_A_CPU.items():
            patch.setenv(name, value)
        with serving.serve(
            place / "merged",
            family,
            dtype="float16",
            log_file=place / "vllm.log",
            adapter=place / "adapter-vllm",
        ) as server:
            yield Served(server, family, rows, base_says, adapter_says)


def _row(spec: JobSpec, number: int, family: families.Family) -> Row:
    question = (Part(text=f"What is {number} plus {number}?"),)
    if family.name == "llm":
        return Row(
            id=str(number),
            messages=(
                Message(role="user", parts=question),
                Message(role="assistant", parts=(Part(text=str(2 * number)),)),
            ),
            images=(),
        )
    sample = formulas.sample(spec.data.train[0].formulas, number)
    return Row(
        id=str(number),
        messages=(
            Message(role="user", parts=(Part(image=0), Part(text=spec.data.instruction))),
            Message(role="assistant", parts=(Part(text=sample.latex),)),
        ),
        images=(inspect(sample.png),),
    )


def test_merged_weights_of_other_families_answer_as_the_model_does(served: Served) -> None:
    found = serving.prove(served.server, served.family, served.rows, served.base_says, ROUNDING)
    assert found.probes == 4
    assert found.tokens >= 4
    assert 0 < found.largest_logprob_difference < ROUNDING


def test_adapters_of_other_families_answer_as_peft_does_and_not_as_the_base(
    served: Served,
) -> None:
    assert served.adapter_says.answers != served.base_says.answers
    found = serving.prove(
        served.server, served.family, served.rows, served.adapter_says, ROUNDING, serving.ADAPTER
    )
    assert found.tokens >= 4
    with pytest.raises(ProofError, match=r"differ|parts from"):
        serving.prove(served.server, served.family, served.rows, served.adapter_says, ROUNDING)
