"""A real vLLM serves the exported weights, and its answers are the trained model's.

`make setup-serving` creates the environment; `plugin/`, installed only there, works around three
bugs of vLLM on CPUs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from job import families
from job.errors import ProofError
from job.export import vllm_proof, vllm_server
from job.prep.rows import Message, Part
from job.spec.load import load_spec
from tests.jobs import FORMULAS, SMALL, job, read_json, sets
from tests.serving.exported import (
    MARKS,
    ON_A_CPU,
    ROUNDING,
    Exported,
    engine_for,
    export,
    served,
)

pytestmark = MARKS

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
ATTENTION = "[q_proj, k_proj, v_proj, o_proj]"


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ON_A_CPU.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    directory = tmp_path_factory.mktemp("exported")
    spec = load_spec(
        Path("specs/latex.yaml").read_text(),
        "specs/latex.yaml",
        [f"lora.target_modules={ATTENTION}"],
        environ={},
    ).spec
    family = families.bind(families.read_checkpoint("tiny", TINY), spec.model, spec.data)
    # An adapter of noise makes trained weights overshoot.
    return export(spec, family, engine_for(spec).initialize(family, 5), directory, noise=0.3)


@pytest.fixture(scope="module")
def server(
    exported: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[vllm_server.VllmServer]:
    with served(exported, tmp_path_factory.mktemp("log") / "vllm.log") as running:
        yield running


def test_exported_weights_answer_as_the_model_does(
    server: vllm_server.VllmServer, exported: Exported
) -> None:
    found = vllm_proof.prove(
        server, exported.family, exported.rows, exported.base_outputs, ROUNDING
    )
    assert (found.probes, found.same_answers) == (4, 4)
    assert found.tokens >= 4
    assert 0 < found.largest_logprob_difference < ROUNDING


def test_the_attention_adapter_answers_as_peft_does_and_not_as_the_base(
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
    assert found.same_answers == 4
    with pytest.raises(ProofError, match=r"differ|diverges from"):
        vllm_proof.prove(server, exported.family, exported.rows, exported.adapter_outputs, ROUNDING)


def test_a_prompt_that_was_not_trained_is_found_out(
    server: vllm_server.VllmServer, exported: Exported
) -> None:
    class Other:
        end_tokens = exported.family.end_tokens
        served_empty_thoughts = exported.family.served_empty_thoughts

        def encode_prompt(self, *row: Any, **mode: Any) -> Any:
            return exported.family.encode_prompt(
                "0", (Message(role="user", parts=(Part(text="Another."),)),), ()
            )

    other: Any = Other()
    with pytest.raises(ProofError, match="is not the trained one"):
        vllm_proof.prove(server, other, exported.rows, exported.base_outputs, ROUNDING)


def test_damaged_weights_are_found_out(exported: Exported, tmp_path: Path) -> None:
    for file in exported.merged.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    [name] = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors[name] = tensors[name].roll(1, 0)
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    with (
        vllm_server.serve(
            tmp_path, exported.family, dtype="float16", log_file=tmp_path / "vllm.log"
        ) as running,
        pytest.raises(ProofError, match=r"differ|diverges from"),
    ):
        vllm_proof.prove(running, exported.family, exported.rows, exported.base_outputs, ROUNDING)


def test_a_directory_that_vllm_cannot_load_ends_in_one_clear_error(
    exported: Exported, tmp_path: Path
) -> None:
    log_file = tmp_path / "vllm.log"
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows"}')
    with (
        pytest.raises(
            ProofError, match=r"vLLM exited with 1 before it was ready\n(?s:.*)nobody_knows"
        ),
        vllm_server.serve(tmp_path, exported.family, dtype="float16", log_file=log_file),
    ):
        pass


def test_a_job_with_routed_experts_is_proven_by_vllm(tmp_path: Path) -> None:
    done = job(
        "run",
        "specs/latex.yaml",
        "--output",
        str(tmp_path / "out"),
        *sets({**SMALL, **FORMULAS, "export.verify": "vllm", "lora.finetune_experts": True}),
    )
    assert done.code == 0, done.err
    proof = read_json(tmp_path / "out" / "merged" / "export.json")
    assert proof["verified"] == "vllm"
    assert proof["merged_served"]["probes"] == 4
    assert proof["merged_served"]["tokens"] >= 4
    assert not (tmp_path / "out" / "vllm.log").exists()
