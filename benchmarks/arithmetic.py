"""Computes the MFU of a training step, and profiles one."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from job.families.encoded import Encoded
from job.families.step_flops import VISION, training_flops

SIDE = 8192
"""Size of the square matrices with which peak FLOP/s are measured."""
MAX_KERNELS = 80


def flops_and_mfu(
    model: Any,
    family: Any,
    rows: Sequence[Encoded],
    device: torch.device,
    measured: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The FLOPs per token of a LoRA step; on a GPU, also adds `mfu` to each way in `measured`.

    MFU is relative to the FLOP/s of a large bf16 matrix product, measured in the same run.
    """
    forward = family.forward_flops(model, [family.row_size(row) for row in rows])
    tokens = sum(len(row.input_ids) for row in rows)
    flops_per_token = training_flops(forward, VISION) / tokens  # the vision tower is adapted too
    found: dict[str, Any] = {"gflop_a_token": round(flops_per_token / 1e9, 2)}
    if device.type != "cuda":
        return found
    peak = product_speed(device)
    for way in measured.values():
        way["mfu"] = round(way["tokens_per_second"] * flops_per_token / peak, 3)
    return {**found, "bf16_product_tflops": round(peak / 1e12)}


def product_speed(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product, the best of five."""
    left, right = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(2 * SIDE**3 / min(times[3:]))


def write_profile(step: Callable[[], Any], path: Path, way: str, rows: int) -> None:
    """Profiles one step, and writes its kernels by device time as JSON."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = sorted(
        (
            event
            for event in profiled.key_averages()
            if str(event.device_type).endswith("CUDA") and "Cuda" not in event.key
        ),
        key=lambda event: -event.self_device_time_total,
    )
    total = sum(event.self_device_time_total for event in kernels)
    lines = [
        {"ms": round(e.self_device_time_total / 1e3, 2), "calls": e.count, "kernel": e.key[:160]}
        for e in kernels[:MAX_KERNELS]
    ]
    found = {
        "device": torch.cuda.get_device_name(),
        "way": way,
        "rows": rows,
        "device_ms": round(total / 1e3, 1),
        "kernels": lines,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
