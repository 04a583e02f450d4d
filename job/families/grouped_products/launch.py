"""Starts the Triton kernels of grouped products. Imported only where Triton is installed."""

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from job.families.grouped_products import kernels
from job.families.grouped_products.tiles import (
    Device,
    OuterTiles,
    Tiles,
    outer_tiles_for,
    tiles_for,
)

COPY_ALIGNMENT = 16
"""Bytes, of the addresses and strides that tensor descriptors accept."""


INTERPRETER = Device(backend="cuda", architecture="sm_80", processors=2)
"""What Triton's interpreter (TRITON_INTERPRET=1) stands for; it runs on tensors of the CPU."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes the GPU the current one, on which Triton starts kernels."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@functools.cache
def device_of(device: torch.device) -> Device:
    """The description of a GPU. Asks the driver, not the GPU, so it never waits."""
    if device.type == "cpu":
        return INTERPRETER
    with current(device):
        target = triton.runtime.driver.active.get_current_target()
    name = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Device(backend=target.backend, architecture=name, processors=count)


def product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    device: Device,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """(M, in) by (E, in, out) to (M, out): each row by the matrix of its expert.

    Expert e's rows end at `ends[e]` (E,), int32; every row belongs to an expert. The weight may
    have any strides. `tiles` overrides the table's.
    """
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (count, inner), (experts, _, width) = rows.shape, weight.shape
    out = rows.new_empty(count, width)
    if not out.numel() or not inner:
        return out.zero_()
    tiles = tiles or tiles_for(
        rows=count,
        experts=experts,
        inner=inner,
        width=width,
        itemsize=rows.element_size(),
        device=device,
    )
    if tiles.descriptors and not fits_descriptors(rows, weight, tiles):
        tiles = replace(tiles, descriptors=False, persistent=0)
    grid = grid_of(count, experts, width, tiles, device)
    constants = {
        "EXPERTS": experts,
        "LANES": triton.next_power_of_2(experts),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "INNER": tiles.inner,
        "GROUP": tiles.group,
        **options(tiles, device),
    }
    if tiles.descriptors:
        inner_is_last = weight.stride(1) == 1
        matrix = weight.transpose(1, 2) if inner_is_last else weight
        block = [tiles.columns, tiles.inner] if inner_is_last else [tiles.inner, tiles.columns]
        kernels.product_by_descriptors[(grid,)](
            TensorDescriptor.from_tensor(rows, [tiles.rows, tiles.inner]),
            TensorDescriptor.from_tensor(matrix.flatten(0, 1), block),
            out,
            ends,
            inner,
            width,
            INNER_IS_LAST=inner_is_last,
            FLATTEN=tiles.persistent > 0,
            **constants,
        )
        return out
    kernels.product[(grid,)](
        rows,
        weight,
        out,
        ends,
        inner,
        width,
        rows.stride(0),
        *weight.stride(),
        WHOLE_COLUMNS=width % tiles.columns == 0,
        WHOLE_INNER=inner % tiles.inner == 0,
        **constants,
    )
    return out


def outer(
    left: torch.Tensor,
    right: torch.Tensor,
    ends: torch.Tensor,
    device: Device,
    tiles: OuterTiles | None = None,
) -> torch.Tensor:
    """(M, in) and (M, out) to (E, in, out): each expert's transposed rows by its other rows."""
    left = left if left.stride(1) == 1 else left.contiguous()
    right = right if right.stride(1) == 1 else right.contiguous()
    (count, height), width, experts = left.shape, right.shape[1], len(ends)
    out = left.new_empty(experts, height, width)
    if not out.numel():
        return out
    tiles = tiles or outer_tiles_for(
        rows=count,
        experts=experts,
        height=height,
        width=width,
        itemsize=left.element_size(),
        device=device,
    )
    grid = experts * triton.cdiv(height, tiles.left) * triton.cdiv(width, tiles.right)
    kernels.outer[(grid,)](
        left,
        right,
        out,
        ends,
        height,
        width,
        left.stride(0),
        right.stride(0),
        LEFT=tiles.left,
        RIGHT=tiles.right,
        ROWS=tiles.rows,
        **options(tiles, device),
    )
    return out


def grid_of(rows: int, experts: int, width: int, tiles: Tiles, device: Device) -> int:
    """How many programs to start. How many tiles there are is known on the device only."""
    most = (rows // tiles.rows + min(experts, rows)) * triton.cdiv(width, tiles.columns)
    if tiles.persistent:
        return min(most, tiles.persistent * device.processors)
    return most


def options(tiles: Tiles | OuterTiles, device: Device) -> dict[str, int]:
    """The compiler's options, by Triton's names."""
    chosen = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if device.architecture.startswith("gfx9"):
        chosen["matrix_instr_nonkdim"] = 16
    return chosen


def fits_descriptors(rows: torch.Tensor, weight: torch.Tensor, tiles: Tiles) -> bool:
    """Whether tensor descriptors can read both: alignment, strides, and whole tiles of `inner`."""
    matrix = weight.transpose(1, 2) if weight.stride(1) == 1 else weight
    return (
        rows.shape[1] % tiles.inner == 0
        and matrix.is_contiguous()
        and all(
            tensor.data_ptr() % COPY_ALIGNMENT == 0
            and tensor.stride(-2) * tensor.element_size() % COPY_ALIGNMENT == 0
            for tensor in (rows, matrix)
        )
    )
