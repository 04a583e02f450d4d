"""Collectives on the process group of the training.

If no group is initialized, every function behaves as for a single process. Counts and flags are
exchanged on the CPU, without synchronizing the GPU.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from job.distributed.coordinator import Coordinator

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""Of one collective: rank 0 may wait for storage. The coordinator detects dead processes sooner."""


@contextmanager
def initialized(coordinator: Coordinator | None, accelerator: str) -> Iterator[None]:
    """Context with a process group of the coordinator's processes, for this kind of accelerator."""
    if coordinator is None:
        yield
        return
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    dist.init_process_group(
        backend="gloo" if accelerator == "cpu" else "cpu:gloo,cuda:nccl",
        store=coordinator.open_store("training"),
        rank=coordinator.world.rank,
        world_size=coordinator.world.size,
        timeout=TIMEOUT,
    )
    try:
        yield
    except RuntimeError as error:
        if _is_connection_error(error):
            raise coordinator.connection_lost(error) from error
        raise
    barrier()  # no process closes its connections while another still uses them
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def is_local_rank_zero() -> bool:
    """Whether this process has local rank 0."""
    return size() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def all_reduce_sum(counts: Sequence[int]) -> list[int]:
    """The sum of each count over all ranks."""
    import torch
    import torch.distributed as dist

    if size() == 1:
        return list(counts)
    sums = torch.tensor(counts)
    dist.all_reduce(sums)
    return [int(each) for each in sums]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return all_reduce_sum([int(flag)])[0] > 0


def all_gather(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank; they must be picklable."""
    import torch.distributed as dist

    if size() == 1:
        return [value]
    values: list[T] = [value] * size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    return all_gather(value)[0]


def barrier() -> None:
    all_gather(None)


def _is_connection_error(error: RuntimeError) -> bool:
    """Whether the connection to another process broke, which gloo reports as text only."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
