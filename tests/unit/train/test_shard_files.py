"""The shards of a checkpoint: stored by some processes, loaded by as many or others."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from job.engines import sharding
from job.train.checkpoint import contents, shard_files
from job.train.checkpoint.shard_files import STATES, WEIGHTS, StoredShards

RATE = 0.1


class Net(torch.nn.Module):
    """Rows that no number of processes divides, and fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(3, 7), torch.nn.Linear(7, 1)
        self.idle = torch.nn.Parameter(torch.randn(2, 2))
        """Has had no gradient, and so no state."""


def net(seed: int) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=RATE)


def trained(model: Net) -> torch.optim.Optimizer:
    """An optimizer after two steps with gradients that are the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = None if name == "idle" else parameter.detach().clone()
        optimizer.step()
    return optimizer


@contextmanager
def process(rank: int, size: int) -> Iterator[None]:
    """A context in which this process is one of several, which are not there."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(seed: int, size: int) -> Net:
    model, _ = net(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    return model


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of two processes."""
    checkpoint = tmp_path_factory.mktemp("stored")
    for rank in range(2):
        with process(rank, 2):
            model = sharded(1, 2)
            optimizer = trained(model)
            shard_files.store_weights(model, checkpoint)
            shard_files.store_optimizer(model, optimizer, checkpoint)
    return checkpoint


def test_the_shards_are_the_whole_tensors(stored: Path) -> None:
    whole, _ = net(1)
    optimizer = trained(whole)
    weights = StoredShards(stored / WEIGHTS)
    assert {name: each.shape for name, each in weights.tensors.items()} == {
        name: each.shape for name, each in whole.named_parameters()
    }
    for name, parameter in whole.named_parameters():
        assert weights.rows(name, 0, len(parameter)).equal(parameter.detach()), name
        assert weights.rows(name, 1, 1).shape == (0, *parameter.shape[1:])
    states = StoredShards(stored / STATES)
    for name in ("wide.weight", "narrow.bias"):
        state = optimizer.state[whole.get_parameter(name)]
        rows = len(state["exp_avg"])
        assert states.rows(f"exp_avg/{name}", 0, rows).equal(state["exp_avg"])
        assert states.rows(f"step/{name}", 0, 0).equal(torch.tensor(2.0))
    assert not any(name.endswith("/idle") for name in states.tensors)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_any_number_of_processes_goes_on_with_them(stored: Path, size: int) -> None:
    whole, _ = net(1)
    expected = trained(whole)
    for rank in range(size):
        with process(rank, size):
            model = sharded(2, size)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
            shard_files.load_weights(model, stored)
            shard_files.load_optimizer(model, optimizer, stored, [RATE])
            assert optimizer.param_groups[0]["lr"] == RATE
            for name, parameter in model.named_parameters():
                full = whole.get_parameter(name)
                assert isinstance(parameter, DTensor)
                first, _ = sharding.own_rows(parameter)
                local = sharding.local_shard(parameter)
                rows = slice(first, first + len(local))
                assert local.equal(full[rows]), (name, rank)
                state = optimizer.state.get(parameter, {})
                assert state.keys() == expected.state.get(full, {}).keys()
                for key, value in state.items():
                    own = sharding.local_shard(value)
                    other = expected.state[full][key]
                    assert own.equal(other[rows] if other.ndim else other), (name, key)


def test_an_optimizer_without_states_is_continued_too(tmp_path: Path) -> None:
    with process(0, 1):
        model = sharded(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        kept = shard_files.store_optimizer(model, optimizer, tmp_path)
        assert kept["state"] == {}
        assert shard_files.stored_states(tmp_path) == {}
        shard_files.load_optimizer(model, optimizer, tmp_path, [RATE])
        assert optimizer.param_groups[0]["lr"] == RATE
        assert not optimizer.state


def test_a_missing_process_or_tensor_is_an_error(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StoredShards(tmp_path)
    folder = shutil.copytree(stored / WEIGHTS, tmp_path / WEIGHTS)
    (folder / "rank-0").rename(folder / "rank-2")
    with pytest.raises(ValueError, match=r"shards of the ranks \[1, 2\]"):
        StoredShards(folder)
    (folder / "rank-2").rename(folder / "rank-0")
    shutil.copytree(stored / STATES / "rank-1", folder / "rank-1", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="different tensors"):
        StoredShards(folder)


@pytest.mark.parametrize(("sharded", "said"), [(False, "are shards"), (True, "are whole")])
def test_weights_that_are_stored_the_other_way_are_told_apart(
    sharded: bool, said: str, tmp_path: Path
) -> None:
    if sharded:
        (tmp_path / "model.safetensors").touch()
    else:
        (tmp_path / WEIGHTS / "rank-0").mkdir(parents=True)
    trainer: Any = SimpleNamespace(is_fsdp_enabled=sharded, model=Net())
    problem = contents.weights_problem(tmp_path, trainer)
    assert problem is not None
    assert said in problem
    assert "fsdp2" in problem
