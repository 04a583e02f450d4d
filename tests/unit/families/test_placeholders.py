"""Models without weights: as loaded in everything but values, which are read in shards."""

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from job import engines, families
from job.engines.device import Accelerator
from job.engines.memory import STACK_COPIES
from job.engines.transformers import TransformersEngine
from job.errors import InputError
from job.families.base import Family
from job.families.placeholders import names_by_weight
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests import models

CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec


def published(directory: Path) -> None:
    """ERNIE-4.5-VL in the published layout: experts one by one, text and vision in one list."""
    source = Path("job/families/builtin/ernie-vl-tiny")
    shutil.copytree(source, directory)


def experts(directory: Path) -> None:
    """A text-only model whose experts are stored one by one, and stacked when it is loaded."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    models.qwen3(directory)
    small = json.loads((directory / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    own = {key: small[key] for key in (*keys, "num_key_value_heads", "intermediate_size")}
    config = Qwen3MoeConfig(
        **own, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1
    )
    torch.manual_seed(1)
    Qwen3MoeForCausalLM(config).save_pretrained(directory)


KINDS: dict[str, Callable[[Path], None]] = {
    "ernie": published,
    "llama": models.llama,
    "qwen3": models.qwen3,
    "qwen_vl": models.qwen_vl,
    "idefics3": models.idefics3,
    "experts": experts,
}


def bind(folder: Path, spec: JobSpec) -> Family:
    return families.bind(families.read_checkpoint("m", folder), spec.model, spec.data)


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("models") / request.param
    KINDS[request.param](directory)
    return directory


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def engine(request: pytest.FixtureRequest, spec: JobSpec) -> TransformersEngine:
    created: Any = engines.create(spec.model, spec.lora, CPU)
    engine: TransformersEngine = replace(created, dtype=request.param)
    return engine


def described(model: Any) -> dict[str, Any]:
    named = model.named_parameters(remove_duplicate=False)
    return {n: (p.shape, p.dtype, p.device, p.requires_grad) for n, p in named}


def test_a_model_without_weights_is_as_loaded_and_its_weights_are_read_in_rows(
    folder: Path, spec: JobSpec, engine: TransformersEngine
) -> None:
    family = bind(folder, spec)
    loaded: Any = engine.load(family)
    random = torch.random.get_rng_state()
    without: Any = engine.without_weights(family)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert described(without) == described(loaded)
    tied = [names for names in names_by_weight(loaded).values() if len(names) > 1]
    assert tied == [names for names in names_by_weight(without).values() if len(names) > 1]
    assert all(p.untyped_storage().nbytes() <= 4 for p in without.parameters())
    buffers = dict(without.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer), name
    assert without.training == loaded.training
    assert {type(m) for m in without.modules()} == {type(m) for m in loaded.modules()}
    assert str(without._weight_conversions) == str(loaded._weight_conversions)
    assert without.config.to_dict() == loaded.config.to_dict()
    with family.stored_weights() as stored:
        weights = dict(loaded.named_parameters())
        read = stored.grouped(name for name in weights if name in stored)
        assert {*read} == weights.keys()
        for name in read:
            weight, middle = weights[name], -(-len(weights[name]) // 2)
            for first, last in ((0, middle), (middle, len(weight)), (len(weight), len(weight))):
                rows = stored.rows(
                    name, first, last, tuple(weight.shape), weight.dtype, weight.device
                )
                assert rows.dtype == weight.dtype
                assert rows.shape == weight[first:last].shape
                assert torch.equal(rows, weight[first:last]), name


class PeakOfTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self._living: set[int] = set()
        self._bytes = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and not each.is_meta:
                self._add(each.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._living:
            self._living.add(storage._cdata)
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._living.remove(key)
        self._bytes -= size


def test_stacking_experts_takes_as_many_copies_as_the_estimate_says(
    tmp_path: Path, spec: JobSpec
) -> None:
    for kind in ("ernie", "experts"):
        KINDS[kind](tmp_path / kind)
        family = bind(tmp_path / kind, spec)
        stacks = {n: p for n, p in family.meta_model().named_parameters() if p.ndim == 3}
        for name, stack in stacks.items():
            together = [p for n, p in stacks.items() if _of_one_name(n, name)]
            with family.stored_weights() as stored, PeakOfTensors() as counted:
                stored.rows(name, 0, 1, tuple(stack.shape), torch.float32, torch.device("cpu"))
            size = sum(each.numel() * 4 for each in together)
            assert size < counted.peak <= STACK_COPIES * size, name


def _of_one_name(name: str, other: str) -> bool:
    """Whether two stacks are of one layer and one projection, of text or vision."""
    return name.replace("vision_moe", "text_moe") == other.replace("vision_moe", "text_moe")


def test_a_damaged_checkpoint_is_refused_as_by_the_loader(
    folder: Path, tmp_path: Path, spec: JobSpec, engine: TransformersEngine
) -> None:
    for path in folder.iterdir():
        if not path.name.startswith("model"):
            (tmp_path / path.name).symlink_to(path)
    family = bind(tmp_path, spec)
    source = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(source)
    name = next(name for name in tensors if name.endswith("q_proj.weight") and "vis" not in name)
    wholes = source.read_bytes()
    damaged: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(wholes[:-16]),
        lambda path: save({k: v for k, v in tensors.items() if k != name}, path),
        lambda path: save({**tensors, name: tensors[name][:-1].clone()}, path),
    ]
    for damage in damaged:
        damage(tmp_path / "model.safetensors")
        with pytest.raises(InputError) as expected:
            engine.load(family)
        with pytest.raises(InputError) as found:
            engine.without_weights(family)
        assert str(found.value) == str(expected.value)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no \.safetensors weights"):
        engine.without_weights(family)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("differ", [False, True])
def test_tied_weights_that_are_stored_twice_are_tied_only_if_they_are_equal(
    differ: bool, tmp_path: Path, spec: JobSpec, engine: TransformersEngine
) -> None:
    models.llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embeddings + 1 if differ else embeddings.clone()
    save(tensors, tmp_path / "model.safetensors")
    family = bind(tmp_path, spec)
    for model in (engine.load(family), engine.without_weights(family)):
        tied = [names for names in names_by_weight(model).values() if len(names) > 1]
        assert len(tied) == (0 if differ else 1)
