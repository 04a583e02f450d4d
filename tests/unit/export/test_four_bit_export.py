"""A training on a base in 4 bits exports the original base with the adapter, and proves it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from job import engines, families
from job.errors import ProofError
from job.export.export import ExportResult
from job.export.export import export as run_export
from job.export.export_context import ExportContext
from job.export.merge import Merge, parameters_of
from job.export.proof import label_logits
from job.export.streamed import streamed_weights
from job.prep.rows import Row
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests import models
from tests.unit.export.test_export import CPU, family, rows, spec

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make setup EXTRAS=gpu")

__all__ = ["family", "rows", "spec"]  # fixtures

EXPERTS = {"finetune_experts": True}


@pytest.fixture
def packed(spec: JobSpec) -> JobSpec:
    text = Path("specs/latex.yaml").read_text()
    given = ["model.load_in_4bit=true", "lora.finetune_experts=true"]
    return load_spec(text, "latex", given, environ={}).spec


def trained(spec: JobSpec, family: families.Family, dtype: torch.dtype | None = None) -> Any:
    """The base, in 4 bits unless a dtype is given, with an adapter as if it had been trained."""
    engine = engines.create(spec.model, spec.lora, CPU)
    base = engine.load(family, dtype)
    model = engine.attach_adapter(base, family.lora_targets(base, spec.lora), spec.lora, 5)
    models.add_noise(model, 0.03)
    return model.eval()


def export(
    spec: JobSpec, family: families.Family, rows: list[Row], directory: Path, damage: Any = None
) -> ExportResult:
    model = trained(spec, family)
    model.save_pretrained(directory / "adapter")

    def bind(merged: Path) -> families.Family:
        if damage is not None:
            damage(merged)
        checkpoint = families.read_checkpoint("merged", merged)
        return families.bind(checkpoint, spec.model, spec.data)

    context = ExportContext(
        spec=spec,
        engine=engines.create(spec.model, spec.lora, CPU),
        family=family,
        rows=rows,
        adapter=directory / "adapter",
        directory=directory,
        load_trained=lambda: model,
        load_base=lambda: model.get_base_model(),
        release=lambda: None,
        bind_merged=bind,
    )
    return run_export(context)


def test_the_export_is_the_original_base_with_the_adapter(
    packed: JobSpec, family: families.Family, rows: list[Row], tmp_path: Path
) -> None:
    result = export(packed, family, rows, tmp_path)
    assert result.tensors_checked == result.tensors
    original = trained(packed, family, torch.float32)
    exact = Merge(original, dtype=torch.float16, keeps_fp32=family.keeps_fp32)
    expected = dict(exact.tensors())
    assert result.adapted_tensors == exact.adapted
    bound = families.bind(
        families.read_checkpoint("merged", tmp_path / "merged"), packed.model, packed.data
    )
    with bound.stored_weights() as merged:
        for name, tensor in expected.items():
            assert torch.equal(merged.read(name, tensor.dtype, CPU.device), tensor), name
    proof = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert proof["merged_reloaded"]["relative_rms"] < 1e-2  # fp16, of the original
    assert proof["in_four_bit"]["relative_rms"] > proof["merged_reloaded"]["relative_rms"] * 10


def test_a_changed_value_on_disk_and_another_adapter_are_found_out(
    packed: JobSpec, family: families.Family, rows: list[Row], tmp_path: Path
) -> None:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors["model.norm.weight"][3] += 0.01
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(ProofError, match=r"norm\.weight.*not the one that was merged"):
        export(packed, family, rows, tmp_path, damage)


def test_weights_that_are_merged_wrongly_are_found_out_by_their_logits(
    packed: JobSpec, family: families.Family, rows: list[Row], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As if the adapter had been added to the weights in 4 bits: bits on disk agree, logits not."""
    from job.export import export as stage
    from job.families.four_bit.tensor import FourBitTensor

    read = stage.reader

    def rounded(context: Any, stored: Any, dtype: torch.dtype) -> Any:
        four_bit, exact = context.engine.four_bit, read(context, stored, dtype)
        return lambda name: FourBitTensor.of(exact(name), four_bit).unpacked()

    monkeypatch.setattr(stage, "reader", rounded)
    with pytest.raises(ProofError, match="merged: its logits differ"):
        export(replace(packed), family, rows, tmp_path)


def test_a_streamed_weight_reaches_all_modules_that_share_it_whatever_its_dtype(
    packed: JobSpec, family: families.Family, rows: list[Row]
) -> None:
    """On a GPU, a model in bf16 runs the exported weights as they are stored, in fp16."""
    model = trained(packed, family, torch.bfloat16)
    names = [name for name, _ in parameters_of(model.get_base_model())]
    before = [parameter for _, parameter in parameters_of(model.get_base_model())]
    assert model.config.tie_word_embeddings
    [tied] = [name for name in names if name.endswith("embed_tokens.weight")]

    with family.stored_weights() as stored:

        def read(name: str) -> torch.Tensor:
            dtype = torch.float32 if family.keeps_fp32(name) else torch.float16
            weight = stored.read(name, dtype, CPU.device)
            return weight * 1.25 if name == tied else weight

        with streamed_weights(model, read, every=True), model.disable_adapter():
            found = label_logits(model, family, rows)
        expected = engines.create(packed.model, packed.lora, CPU).load(family, torch.float16)
        expected.get_input_embeddings().weight.mul_(1.25)
    assert torch.equal(found, label_logits(expected, family, rows))
    after = [parameter for _, parameter in parameters_of(model.get_base_model())]
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
