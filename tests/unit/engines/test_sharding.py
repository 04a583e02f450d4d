"""Sharded models: what they compute in, and what sharding leaves in memory."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from job.engines import sharding


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.norm(hidden), self.linear(hidden)


def sharded() -> Net:
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_sharded_model_computes_in_bf16_as_autocast_does_and_keeps_fp32_weights() -> None:
    torch.manual_seed(0)
    plain = Net()
    model = sharded()
    with torch.no_grad():
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            sharding.local_shard(mine).copy_(other)
    sharding.autocast_forward(model, torch.device("cpu"))
    hidden = torch.randn(2, 4)
    norm, product = model(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(hidden)
    assert norm.dtype == torch.float32
    assert product.dtype == torch.bfloat16
    assert norm.equal(expected[0])
    assert product.equal(expected[1])
    (norm.sum() + product.float().sum()).backward()
    (expected[0].sum() + expected[1].float().sum()).backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert mine.grad is not None
        assert other.grad is not None
        assert sharding.local_shard(mine.grad).equal(other.grad)


@pytest.mark.usefixtures("alone")
def test_gradients_that_are_zero_everywhere_are_dropped_and_no_others() -> None:
    model = sharded()
    _, product = model(torch.randn(2, 4))
    (product[:, 0].sum() + 0 * sum(each.sum() for each in model.norm.parameters())).backward()
    sharding.drop_zero_gradients(model)
    found = {name: each.grad is not None for name, each in model.named_parameters()}
    assert found == {
        "norm.weight": False,
        "norm.bias": False,
        "linear.weight": True,
        "linear.bias": True,
    }


def test_no_whole_weights_are_kept_while_blocks_are_sharded() -> None:
    model = Net()
    with sharding.whole_weights_freed(model):
        assert model.state_dict() == {}
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


@pytest.mark.usefixtures("alone")
def test_sharded_weights_are_gathered_in_the_order_of_their_names() -> None:
    model = sharded()
    weights = sharding.gathered_weights(model)
    names = [*weights.meta_tensors][::-1]
    gathered = list(weights.tensors(names))
    assert [name for name, _ in gathered] == names
    for name, tensor in gathered:
        assert type(tensor) is torch.Tensor
        assert tensor.shape == weights.meta_tensors[name].shape
