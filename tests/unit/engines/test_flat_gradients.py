"""Gradients in flat buffers: averaged over processes as DDP does."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from job.engines.flat_gradients import FlatGradients

PROCESSES = 2


def average(rank: int, place: Path) -> None:
    """What a process does: gradients that depend on its rank, in two dtypes, are averaged."""
    dist.init_process_group(
        "gloo", init_method=f"file://{place / 'store'}", rank=rank, world_size=PROCESSES
    )
    weights = [
        nn.Parameter(torch.zeros(2, 3)),
        nn.Parameter(torch.zeros(4, dtype=torch.float64)),
        nn.Parameter(torch.zeros(5)),
    ]
    gradients = FlatGradients(weights)
    gradients.attach()
    for number, weight in enumerate(weights):
        (weight * (number + 1) * (1 + 2 * rank)).sum().backward()
    gradients.average()
    torch.save([weight.grad for weight in weights], place / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_have_the_mean_of_their_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(average, (tmp_path,), PROCESSES)
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt")
        for number, each in enumerate(found):
            assert each.eq(2 * (number + 1)).all()
        assert [each.dtype for each in found] == [torch.float32, torch.float64, torch.float32]


def test_one_process_keeps_its_own() -> None:
    weight = nn.Parameter(torch.zeros(3))
    gradients = FlatGradients([weight])
    gradients.attach()
    weight.sum().backward()
    gradients.average()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 1, 1]
