"""Counts the FLOPs of a training step, and computes its MFU."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from job.families.base import Encoded
from job.families.ernie45_vl.activation_memory import head_dim

SIDE = 8192
"""Size of the square matrices with which peak FLOP/s are measured."""
MAX_KERNELS = 80


def flops_and_mfu(
    config: Any,
    family: Any,
    rows: Sequence[Encoded],
    device: torch.device,
    measured: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The FLOPs per token of a LoRA step; on a GPU, also adds `mfu` to each way in `measured`.

    MFU is relative to the FLOP/s of a large bf16 matrix product, measured in the same run.
    """
    flops_per_token = flops(config, family, rows) / sum(len(row.input_ids) for row in rows)
    found: dict[str, Any] = {"gflop_a_token": round(flops_per_token / 1e9, 2)}
    if device.type != "cuda":
        return found
    peak = product_speed(device)
    for way in measured.values():
        way["mfu"] = round(way["tokens_per_second"] * flops_per_token / peak, 3)
    return {**found, "bf16_product_tflops": round(peak / 1e12)}


def flops(config: Any, family: Any, rows: Sequence[Encoded]) -> float:
    """FLOPs of a LoRA step over the rows.

    Two per weight and token in the forward pass, and two in the backward pass: frozen weights need
    no gradient of their own. Attention and adapters, less than 3%, are ignored.
    """
    text, vision = config.text_config, config.vision_config
    hidden = text.hidden_size
    attention = hidden * head_dim(text) * 2 * (text.num_attention_heads + text.num_key_value_heads)
    sparse = sum(kind == "sparse" for kind in text.mlp_layer_types)
    dense = len(text.mlp_layer_types) - sparse
    shared = 3 * hidden * text.moe_intermediate_size[0] * text.moe_num_shared_experts
    common = (
        (sparse + dense) * attention
        + dense * 3 * hidden * text.intermediate_size
        + sparse * (shared + hidden * text.moe_num_experts)
    )
    routed = [sparse * text.moe_k * 3 * hidden * inner for inner in text.moe_intermediate_size]
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    merged = vision.hidden_size * vision.spatial_merge_size**2
    # Spatial: two matrices of merged². Temporal: three, because its first matrix is twice as wide.
    resampler = merged * merged * 5 + merged * hidden
    total = 0.0
    for row in rows:
        size = family.row_size(row)
        image_tokens, patches = size.image_tokens, sum(size.patches)
        total += (size.tokens - image_tokens) * (common + routed[0])
        total += image_tokens * (common + routed[1])
        total += size.supervised_tokens * hidden * text.vocab_size
        total += patches * vision.depth * block
        total += patches / vision.spatial_merge_size**2 * resampler
    return 4 * total


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
