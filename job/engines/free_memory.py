"""Memory that a computation may still take, and whether one took too much."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from job.engines.cpu import CGROUPS, memory_limit

if TYPE_CHECKING:
    import torch


def free_memory(device: "torch.device", cgroups: Path = CGROUPS) -> int:
    """Bytes that this process may still allocate on the device.

    In a container the machine's free memory does not matter if its own limit is closer; page cache
    counts as free in both.
    """
    if device.type != "cpu":
        from job.families.gpu_memory import free_gpu_memory

        return free_gpu_memory(device)
    import psutil

    available: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        used = int((cgroups / "memory.current").read_text())
        for line in (cgroups / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        available = min(available, memory_limit(cgroups) - used)
    return max(available, 0)


_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")
"""What PyTorch's CPU allocator, CUDA, HIP and Triton, and cuBLAS say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine ran out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in text for each in _OUT_OF_MEMORY)
