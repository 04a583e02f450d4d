"""Weights that are read once the model is sharded: each process has its rows, and no others."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from job import engines, families
from job.engines import sharding
from job.engines.device import Accelerator
from job.engines.unread import UnreadWeights
from job.errors import OutOfMemoryError
from job.families.base import Family
from job.families.stored_weights import StoredWeights
from job.spec.load import load_spec
from job.spec.types import JobSpec
from tests.models import BUILDERS

CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
PROCESSES = 3


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec


@pytest.fixture(params=range(PROCESSES))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of three processes, whose shards are uneven and may be empty."""
    dist.init_process_group("fake", rank=request.param, world_size=PROCESSES, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[*BUILDERS, "tied", "ernie"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, spec: JobSpec
) -> Family:
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    if request.param == "ernie":
        folder = Path("job/families/builtin/ernie-vl-tiny")
    elif request.param == "tied":
        BUILDERS["llama"](folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        BUILDERS[request.param](folder)
    return families.bind(families.read_checkpoint("m", folder), spec.model, spec.data)


def accelerate(model: nn.Module) -> Any:
    """What sharding asks Accelerate's accelerator for."""
    config = sharding.config(model)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=config["transformer_layer_cls_to_wrap"],
        cpu_ram_efficient_loading=False,
    )
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_process_has_its_rows_of_every_weight(
    method: str, rank: int, family: Family, spec: JobSpec
) -> None:
    engine = engines.create(spec.model, spec.lora, CPU)
    loaded, model = engine.load(family), engine.without_weights(family)
    unread = UnreadWeights(family, model)
    whole: nn.Module = loaded
    trained: nn.Module = model
    if method == "lora":
        targets = family.lora_targets(loaded, spec.lora)
        whole = engine.attach_adapter(loaded, targets, spec.lora, 5)
        trained = engine.attach_adapter(model, targets, spec.lora, 5)
    unread.shard(accelerate(model), trained)
    weights, shards = dict(whole.named_parameters()), dict(trained.named_parameters())
    assert weights.keys() == shards.keys()  # tied weights are so still
    for name, weight in weights.items():
        shard = shards[name]
        assert isinstance(shard, DTensor)
        assert (shard.shape, shard.dtype) == (weight.shape, weight.dtype)
        assert shard.requires_grad == weight.requires_grad
        chunks = weight.chunk(PROCESSES)
        own = chunks[rank] if rank < len(chunks) else weight[:0]
        assert torch.equal(shard.to_local(), own), name
    modules = dict(trained.named_modules())
    for name, module in whole.named_modules():
        for key, tensor in module._parameters.items():
            if tensor is not None:
                assert isinstance(modules[name]._parameters[key], DTensor), f"{name}.{key}"


def test_shards_that_do_not_fit_are_not_taken_for_a_step_that_does_not(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    folder = Path("job/families/builtin/ernie-vl-tiny")
    family = families.bind(families.read_checkpoint("m", folder), spec.model, spec.data)
    model = engines.create(spec.model, spec.lora, CPU).without_weights(family)
    monkeypatch.setattr(StoredWeights, "rows", full)
    dist.init_process_group("fake", rank=0, world_size=PROCESSES, store=FakeStore())
    try:
        with pytest.raises(OutOfMemoryError, match="shards of the weights do not fit") as caught:
            UnreadWeights(family, model).shard(accelerate(model), model)
    finally:
        dist.destroy_process_group()
    assert "batch_size" not in str(caught.value)


def test_an_optimizer_keeps_its_weights_though_their_shards_have_no_rows() -> None:
    weights = [nn.Parameter(torch.empty(0, 4)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}])

    class ByAddress:
        def prepare(self, optimizer: torch.optim.Optimizer) -> str:
            for group in optimizer.param_groups:
                group["params"] = [weights[-1] for _ in group["params"]]
            return "prepared"

    accelerator: Any = ByAddress()
    with sharding.optimizer_kept(accelerator, optimizer):
        assert accelerator.prepare(optimizer) == "prepared"
        kept = [each for group in optimizer.param_groups for each in group["params"]]
        assert [*map(id, kept)] == [*map(id, weights)]
    accelerator.prepare(optimizer)
    assert optimizer.param_groups[0]["params"][0] is weights[-1]
