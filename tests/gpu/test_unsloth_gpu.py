"""Both engines on a GPU: the same losses from the same rows, and a verified export."""

import json
from pathlib import Path

import pytest
import torch

from job.engines.choice import PACKAGES, installed
from tests import models
from tests.jobs import job, read_json, sets, small_run

MISSING = [name for name in PACKAGES if name not in installed()]
STEPS = 8
BF16 = 5e-2
"""Relative tolerance of the losses: products are rounded to 8 bits, in another order."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


def losses(output: Path) -> list[float]:
    lines = (output / "train" / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("model", ["ernie", "qwen_vl"])
def test_both_engines_train_the_same_and_unsloth_s_export_is_verified(
    tmp_path: Path, model: str
) -> None:
    settings: dict[str, object] = {"train.max_steps": STEPS, "train.gradient_checkpointing": False}
    if model == "qwen_vl":
        models.qwen_vl(tmp_path / "model")
        settings["model.model_name_or_path"] = tmp_path / "model"
    for engine in ("transformers", "unsloth"):
        more = sets({**settings, "model.engine": engine})
        done = job(*small_run(str(tmp_path / engine), *more, cache=tmp_path / "cache"))
        assert done.code == 0, done.err
    plain, other = losses(tmp_path / "transformers"), losses(tmp_path / "unsloth")
    assert len(plain) == STEPS
    assert other[0] == pytest.approx(plain[0], rel=BF16 / 5)
    assert other == pytest.approx(plain, rel=BF16)
    proof = read_json(tmp_path / "unsloth" / "merged" / "export.json")
    assert proof["tensors_checked"] == proof["tensors"]
    assert proof["merged_reloaded"]["relative_rms"] < 5e-2
    assert proof["trained_against_base"]["relative_rms"] > proof["merged_reloaded"]["relative_rms"]
    assert not list(Path().glob("unsloth_compiled_cache*"))


def test_the_default_engine_reads_what_unsloth_trained(tmp_path: Path) -> None:
    more = sets({"model.engine": "unsloth"})
    done = job(*small_run(str(tmp_path / "out"), *more, cache=tmp_path / "cache"))
    assert done.code == 0, done.err
    plain = sets({"model.engine": "transformers", "output.uri": tmp_path / "out"})
    answer = job("infer", "specs/latex.yaml", "--question", "x", "--weights", "adapter", *plain)
    assert answer.code == 0, answer.err
