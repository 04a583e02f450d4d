"""Memory of a GPU that a computation may still take."""

import torch


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate; blocks that PyTorch keeps for reuse are free.

    Except those of captured graphs, which have pools of their own.
    """
    torch.cuda.empty_cache()  # else the pools of graphs that are gone would not be free
    free, total = torch.cuda.mem_get_info(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    # PyTorch may be limited to a part of the memory, which the driver does not know of.
    allowed = total * torch.cuda.get_per_process_memory_fraction(index)
    free = max(0, min(free, int(allowed) - torch.cuda.memory_reserved(index)))
    kept = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment["segment_pool_id"]) == (0, 0)
    )
    return int(free + kept)
