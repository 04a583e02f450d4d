"""A real vLLM serves what the families `vlm` and `llm` export: merged weights, and an adapter."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from job import families
from job.errors import ProofError
from job.export import vllm_proof, vllm_server
from job.spec.load import load_spec
from tests.models import BUILDERS
from tests.serving.exported import MARKS, ROUNDING, Exported, engine_for, export, served

SPECS = {"qwen_vl": "specs/latex.yaml", "qwen3": "specs/text.yaml", "llama": "specs/text.yaml",
         "idefics3": "specs/latex.yaml"}  # fmt: skip

pytestmark = MARKS


@pytest.fixture(scope="module", params=SPECS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
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
    return export(spec, family, engine_for(spec).load(family), place, noise=0.1)


@pytest.fixture(scope="module")
def server(exported: Exported) -> Iterator[vllm_server.VllmServer]:
    with served(exported, exported.merged.parent / "vllm.log") as running:
        yield running


def test_merged_weights_of_other_families_answer_as_the_model_does(
    server: vllm_server.VllmServer, exported: Exported
) -> None:
    found = vllm_proof.prove(
        server, exported.family, exported.rows, exported.base_outputs, ROUNDING
    )
    assert found.probes == 4
    assert found.tokens >= 4
    assert 0 < found.largest_logprob_difference < ROUNDING


def test_adapters_of_other_families_answer_as_peft_does_and_not_as_the_base(
    server: vllm_server.VllmServer, exported: Exported
) -> None:
    assert exported.adapter_outputs.answers != exported.base_outputs.answers
    found = vllm_proof.prove(
        server,
        exported.family,
        exported.rows,
        exported.adapter_outputs,
        ROUNDING,
        vllm_server.ADAPTER,
    )
    assert found.tokens >= 4
    with pytest.raises(ProofError, match=r"differ|diverges from"):
        vllm_proof.prove(server, exported.family, exported.rows, exported.adapter_outputs, ROUNDING)
