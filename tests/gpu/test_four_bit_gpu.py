"""A base in 4 bits on a GPU: the job under a limit of memory, and loading it weight by weight."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from job.engines.device import release_memory
from job.families.four_bit import FourBit
from job.spec.load import load_spec
from tests.jobs import ROOT, read_json, sets, small_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
NF4 = FourBit(quant_type="nf4", double_quant=True)
LIMIT = 3.0
"""GiB; the tiny model needs little of it."""


@pytest.mark.parametrize("experts", ["false", "true"])
def test_the_whole_job_runs_under_a_limit_and_its_export_is_verified(
    tmp_path: Path, experts: str
) -> None:
    more = sets({"model.load_in_4bit": "true", "lora.finetune_experts": experts})
    arguments = small_run(str(tmp_path / "out"), *more, cache=tmp_path / "cache")
    command = [sys.executable, "-m", "benchmarks.limited_memory", str(LIMIT), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    proof = read_json(tmp_path / "out" / "merged" / "export.json")
    assert proof["tensors_checked"] == proof["tensors"]
    assert proof["merged_reloaded"]["relative_rms"] < 5e-2
    assert proof["in_four_bit"]["relative_rms"] > 0
    run = read_json(tmp_path / "out" / "run.json")
    assert run["stages"]["train"]["summary"]["peak_memory_bytes"] <= LIMIT * 2**30


def test_loading_holds_no_more_than_one_weight_and_its_parts_unpacked(tmp_path: Path) -> None:
    """A base whose packed weights are far larger than its largest one."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.models import qwen3

    qwen3(tmp_path)  # its tokenizer and configuration, for a larger model of the kind
    config = Qwen3Config.from_pretrained(tmp_path)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 4096, 12
    config.layer_types = ["full_attention"] * 12
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    from job import families

    spec = load_spec(Path("specs/latex.yaml").read_text(), "latex", environ={}).spec
    bound = families.bind(families.read_checkpoint("large", tmp_path), spec.model, spec.data)
    device = torch.device("cuda", torch.cuda.current_device())
    release_memory()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = bound.load(dtype=torch.bfloat16, device=device, four_bit=NF4)
    held = torch.cuda.memory_allocated() - before
    largest = max(parameter.numel() for parameter in model.parameters()) * 2
    assert torch.cuda.max_memory_allocated() - before < held + 3 * largest
    assert held < sum(parameter.numel() for parameter in model.parameters()) * 2 / 2
