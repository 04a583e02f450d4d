"""The process group of the training, where several processes train together.

Outside `formed` every function answers for one process alone, so that who calls them need not ask.
Counts and flags go over the CPU: asking for them never waits for a GPU.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from job.distributed.coordinator import Coordinator

TIMEOUT = timedelta(hours=2)
"""Of one exchange: rank 0 may have to wait for a store. Dead processes are noticed far sooner."""


@contextmanager
def formed(coordinator: Coordinator | None, kind: str) -> Iterator[None]:
    """Within, the processes of `coordinator` are a group; `kind` is the accelerator's."""
    if coordinator is None:
        yield
        return
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    dist.init_process_group(
        backend="gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
        store=coordinator.store("training"),
        rank=coordinator.world.rank,
        world_size=coordinator.world.size,
        timeout=TIMEOUT,
    )
    try:
        yield
    except RuntimeError as error:
        if _is_broken(error):
            raise coordinator.lost(error) from error
        raise
    barrier()  # none closes its ends while another still speaks
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def leads_machine() -> bool:
    """Whether this process does what is done once on each machine."""
    return size() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def totals(counts: Sequence[int]) -> list[int]:
    """Of each count, the sum over all processes."""
    import torch
    import torch.distributed as dist

    if size() == 1:
        return list(counts)
    found = torch.tensor(counts)
    dist.all_reduce(found)
    return [int(each) for each in found]


def any_of(flag: bool) -> bool:
    """Whether it holds in any process."""
    return totals([int(flag)])[0] > 0


def gathered(value: Any) -> list[Any]:
    """What every process gives, by rank, in every process; values that pickle."""
    import torch.distributed as dist

    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def from_first(value: Any) -> Any:
    """Rank 0's value, in every process."""
    return gathered(value)[0]


def barrier() -> None:
    gathered(None)


def _is_broken(error: RuntimeError) -> bool:
    """Whether the connection to another process broke, which gloo says in words only."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
