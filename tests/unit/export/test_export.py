"""The merge and its proof: correct for every kind of adapter, and wrong weights are detected."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from job import engines, families
from job.engines.device import Accelerator
from job.errors import ProofError
from job.export import tensor_digests
from job.export.export import ExportResult
from job.export.export import export as run_export
from job.export.export_context import ExportContext
from job.export.merge import Merge, fits
from job.export.proof import Comparison, compare, probe_outputs, require_equal
from job.export.tensor_digests import checksum, sha256
from job.prep import formulas
from job.prep.images import inspect
from job.prep.rows import Message, Part, Row
from job.spec.load import load_spec
from job.spec.types import JobSpec

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)

KINDS: dict[str, dict[str, Any]] = {
    "the reference targets": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "with routed experts": {"finetune_experts": True},
    "with trained biases": {"bias": "lora_only"},
}


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec


@pytest.fixture(scope="module")
def family(spec: JobSpec) -> families.Family:
    return families.bind(families.read_checkpoint("tiny", TINY), spec.model, spec.data)


@pytest.fixture(scope="module")
def rows(spec: JobSpec) -> list[Row]:
    samples = [formulas.sample(spec.data.train[0].formulas, index) for index in range(3)]
    return [
        Row(
            id=str(number),
            messages=(
                Message(role="user", parts=(Part(image=0), Part(text="Read."))),
                Message(role="assistant", parts=(Part(text=sample.latex),)),
            ),
            images=(inspect(sample.png),),
        )
        for number, sample in enumerate(samples)
    ]


def adapted(spec: JobSpec, family: families.Family, **lora: Any) -> Any:
    """A model with a nonzero adapter, as if it had been trained."""
    engine = engines.create(spec.model, spec.lora, CPU)
    settings = replace(spec.lora, **lora)
    base = engine.initialize(family, 5)
    model = engine.attach_adapter(base, family.lora_targets(base, settings), settings, 5)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or (parameter.requires_grad and name.endswith("bias")):
            parameter.data.normal_(std=0.03, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_say_what_the_adapter_says(
    spec: JobSpec, family: families.Family, rows: list[Row], kind: str
) -> None:
    model = adapted(spec, family, **KINDS[kind])
    expected = probe_outputs(model, family, rows)
    with model.disable_adapter():
        base = probe_outputs(model, family, rows)
    merge = Merge(model, dtype=torch.float32, keeps_fp32=family.keeps_fp32)
    state = dict(merge.tensors())
    assert merge.changed == merge.adapted > 0
    plain = engines.create(spec.model, spec.lora, CPU).initialize(family, 5)
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embeddings
    found = compare(expected, probe_outputs(plain, family, rows))
    assert found.relative_rms < 1e-5
    assert compare(expected, base).relative_rms > 1e-2


def test_a_merge_that_does_not_fit_into_fp16_is_refused(
    spec: JobSpec, family: families.Family
) -> None:
    model = adapted(spec, family)
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    parameter.data.fill_(1e7)
    with pytest.raises(ProofError, match=r"[0-9]+ values .* overflow the dtype") as caught:
        list(Merge(model, dtype=torch.float16, keeps_fp32=family.keeps_fp32).tensors())
    assert "bfloat16" in str(caught.value)
    wider = Merge(model, dtype=torch.bfloat16, keeps_fp32=family.keeps_fp32)
    assert dict(wider.tensors())
    assert wider.changed, name


def test_a_value_that_is_not_finite_is_refused(spec: JobSpec, family: families.Family) -> None:
    model = adapted(spec, family)
    weight = next(p for n, p in model.named_parameters() if "base_layer" in n)
    weight.data[0] = float("nan")
    with pytest.raises(ProofError, match=f"{weight.shape[1]} values that are not finite"):
        list(Merge(model, dtype=torch.float32, keeps_fp32=family.keeps_fp32).tensors())


@pytest.mark.parametrize("special", [0.0, 65503.0, 65519.0, 65521.0, -7e4, "nan", "inf", "-inf"])
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32])
def test_whether_values_fit_is_what_counting_says(special: Any, target: torch.dtype) -> None:
    values = torch.tensor([1.5, float(special), -3.0])
    counted = int(torch.isfinite(values.to(target)).sum()) == 3
    assert fits(values, target) is counted
    assert fits(values[:0], target)


class Export:
    """The export stage on a small adapted model, with a hook between writing and proving."""

    def __init__(
        self, spec: JobSpec, family: families.Family, rows: list[Row], directory: Path
    ) -> None:
        self.spec, self.family, self.rows, self.directory = spec, family, rows, directory
        self.engine = engines.create(spec.model, spec.lora, CPU)
        self.model = adapted(spec, family)
        self.model.save_pretrained(directory / "adapter")

    def run(self, damage: Any = None) -> ExportResult:
        def bind(directory: Path) -> families.Family:
            if damage is not None:
                damage(directory)
            checkpoint = families.read_checkpoint("merged", directory)
            return families.bind(checkpoint, self.spec.model, self.spec.data)

        context = ExportContext(
            spec=self.spec,
            engine=self.engine,
            family=self.family,
            rows=self.rows,
            adapter=self.directory / "adapter",
            directory=self.directory,
            load_trained=lambda: self.model,
            load_base=lambda: self.model.get_base_model(),
            release=lambda: None,
            bind_merged=bind,
        )
        return run_export(context)


@pytest.fixture
def export(spec: JobSpec, family: families.Family, rows: list[Row], tmp_path: Path) -> Export:
    return Export(spec, family, rows, tmp_path)


def test_an_export_writes_its_proof(export: Export, tmp_path: Path) -> None:
    result = export.run()
    assert result.tensors_checked == result.tensors
    proof = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert proof["adapter_reloaded"]["same_answers"] == proof["adapter_reloaded"]["probes"] == 3
    assert {file["path"] for file in proof["files"]} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("digests", ["hashes", "checksums"])
def test_one_changed_value_on_disk_is_found_out(
    digests: str, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    if digests == "checksums":  # as on a GPU
        monkeypatch.setattr(tensor_digests, "HASHED_ON", ())

    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors["model.norm.weight"][3] += 0.01
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(ProofError, match=r"norm\.weight.*not the one that was merged") as caught:
        export.run(damage)
    assert caught.value.exit_code == 30


def test_another_adapter_on_disk_is_found_out(export: Export, tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: t * 1.5 for name, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ProofError, match="adapter: its logits differ"):
        export.run()


def test_an_answer_that_parts_at_a_clear_choice_is_no_rounding() -> None:
    found = Comparison(
        relative_rms=1e-6,
        largest=1e-6,
        same_top1=1.0,
        same_answers=2,
        decided_differently=1,
        probes=3,
    )
    with pytest.raises(ProofError, match="1 of 3 greedy answers"):
        require_equal("merged", found, "float16")


def test_a_difference_that_is_not_a_number_is_no_equality() -> None:
    found = Comparison(
        relative_rms=float("nan"),
        largest=0.0,
        same_top1=1.0,
        same_answers=3,
        decided_differently=0,
        probes=3,
    )
    with pytest.raises(ProofError):
        require_equal("merged", found, "float16")


def test_digests_tell_bit_patterns_apart() -> None:
    zero = torch.zeros(3)
    for digest in (sha256, lambda tensor: checksum(tensor).tolist()):
        assert digest(zero) == digest(torch.zeros(3))
        assert digest(zero) != digest(-zero)


@pytest.mark.parametrize("size", [1, 2, 5, 2**22, 2**22 + 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_checksums_see_every_bit_and_every_exchange(size: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    seen = checksum(tensor).tolist()
    bits = tensor.view(torch.int16 if dtype == torch.float16 else torch.int32)
    for flipped in ([0], [-1], [0, -1], list(range(min(size, 8)))):
        other = bits.clone()
        other[flipped] ^= torch.iinfo(bits.dtype).min  # two changes that a plain sum would lose
        assert checksum(other.view(dtype)).tolist() != seen
    for moved in (tensor.flip(0), tensor.roll(1)):
        assert (checksum(moved).tolist() == seen) is moved.equal(tensor)


def test_a_checksum_depends_on_values_alone() -> None:
    """Not on how a tensor lies in memory, which differs between the merge and the reload."""
    tensor = torch.arange(35, dtype=torch.bfloat16).reshape(5, 7)
    other = torch.cat([torch.ones(3, dtype=torch.bfloat16), tensor.flatten()])[3:].reshape(5, 7)
    assert checksum(tensor).tolist() == checksum(other).tolist()
    assert checksum(tensor.T).tolist() == checksum(tensor.T.contiguous()).tolist()
    assert checksum(torch.empty(0)).tolist() == [0, 0]
