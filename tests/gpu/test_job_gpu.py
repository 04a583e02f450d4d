"""The whole job on a GPU: an adapter on bf16 weights, and fp32 weights under bf16 autocast."""

from pathlib import Path

import pytest
import torch

from tests.jobs import FULL, job, read_json, sets, small_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_whole_job_runs_and_its_export_is_verified(tmp_path: Path, method: str) -> None:
    more = sets({**(FULL if method == "full" else {}), "train.max_steps": 20})
    done = job(*small_run(str(tmp_path / "out"), *more, cache=tmp_path / "cache"))
    assert done.code == 0, done.err
    run = read_json(tmp_path / "out" / "run.json")
    assert run["metrics"]["final"]["loss"] < run["metrics"]["baseline"]["loss"]
    proof = read_json(tmp_path / "out" / "merged" / "export.json")
    assert proof["tensors_checked"] == proof["tensors"]
    assert proof["merged_reloaded"]["relative_rms"] < 5e-2
    assert proof["trained_against_base"]["relative_rms"] > proof["merged_reloaded"]["relative_rms"]
