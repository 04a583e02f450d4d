"""Memory that a computation may still take, and whether one took too much."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from job.engines.cpu import CGROUPS, memory_limit

if TYPE_CHECKING:
    import torch


def free_memory(device: "torch.device", cgroups: Path = CGROUPS) -> int:
    """Bytes that this process may still allocate on the device.

    On a GPU, blocks that PyTorch keeps for reuse count as free. In a container the machine's free
    memory does not matter if its own limit is closer; page cache counts as free in both.
    """
    if device.type != "cpu":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept)
    import psutil

    available: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        used = int((cgroups / "memory.current").read_text())
        for line in (cgroups / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        available = min(available, memory_limit(cgroups) - used)
    return max(available, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine ran out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error).lower()
