"""Which tile sizes a grouped product uses on which device: a fixed table.

A table, because tuning at run time would wait for the device in the middle of a step. Which entry
applies follows from shapes and the device alone, so that it does not differ between runs.
`python -m benchmarks.grouped_products --tune` measures the alternatives.
"""

from dataclasses import dataclass, replace

KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the choice of tiles depends on."""

    backend: str
    """`cuda` or `hip`, as Triton calls them."""
    architecture: str
    """`sm_90`, `gfx942`, …"""
    processors: int
    """Streaming multiprocessors or compute units."""


SHARED_MEMORY = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_87": 163 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_103": 227 * KIB,
    "sm_110": 227 * KIB,
    "gfx950": 160 * KIB,
}
"""Bytes that one program may use; `SMALLEST_SHARED_MEMORY` on other devices of the backend."""
SMALLEST_SHARED_MEMORY = {"cuda": 99 * KIB, "hip": 64 * KIB}


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile sizes of `product`, and how its programs are compiled and started."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8
    """Tiles of rows that share a column of weights in the L2 cache."""
    persistent: int = 0
    """Programs per processor, each of which computes many tiles; 0 for a program per tile."""
    descriptors: bool = False
    """Whether tiles are read by tensor descriptors (TMA), where shapes allow."""


@dataclass(frozen=True, kw_only=True)
class OuterTiles:
    """Tile sizes of `outer`: of its result, and the rows that are read at a time."""

    left: int
    right: int
    rows: int
    warps: int
    stages: int


THIN = 64
"""Up to this size on one side, a product hardly computes: adapters."""


def tiles_for(
    *, rows: int, experts: int, inner: int, width: int, itemsize: int, device: Device
) -> Tiles:
    """The tiles of a product of `rows` rows of `experts` experts, (inner, width) each."""
    per_expert = rows // max(experts, 1)
    if itemsize == 4:
        wide = _fp32(per_expert, device)
    elif device.backend == "hip":
        wide = _amd(per_expert, device)
    elif shared_memory(device) >= 227 * KIB:
        wide = _hopper(per_expert)
    else:
        wide = _ampere(per_expert, device)
    if min(inner, width) <= THIN:  # bound by memory: many small programs
        wide = replace(wide, rows=min(wide.rows, 64), columns=min(wide.columns, 128))
        wide = replace(wide, descriptors=False, persistent=0)
        wide = replace(wide, warps=wide.warps if itemsize == 4 else 4)
    return replace(
        wide,
        columns=min(wide.columns, _power_of_two(width)),
        inner=min(wide.inner, _power_of_two(inner)),
    )


def _fp32(per_expert: int, device: Device) -> Tiles:
    # Only CDNA has matrix instructions without TF32; elsewhere the registers limit the tile.
    rows = 64 if per_expert > 24 else 16
    return Tiles(rows=rows, columns=64, inner=32, warps=4 if _is_cdna(device) else 8, stages=2)


def _is_cdna(device: Device) -> bool:
    return device.backend == "hip" and device.architecture.startswith("gfx9")


def _is_rdna(device: Device) -> bool:
    """Whether it is a Radeon: half the registers of an Instinct for a lane's accumulators."""
    return device.backend == "hip" and not _is_cdna(device)


def _hopper(per_expert: int) -> Tiles:
    if per_expert > 96:
        tiles = Tiles(rows=128, columns=256, inner=64, warps=8, stages=3, descriptors=True)
        # So that a tile is stored while the next is read: registers admit one program at a time.
        return replace(tiles, persistent=1)
    if per_expert > 24:  # bound by reading the weights, so many small loads in flight
        return Tiles(rows=64, columns=128, inner=128, warps=4, stages=3, descriptors=True)
    return Tiles(rows=16, columns=128, inner=128, warps=4, stages=4)


def _ampere(per_expert: int, device: Device) -> Tiles:
    if per_expert > 96:
        if shared_memory(device) > 99 * KIB:
            return Tiles(rows=128, columns=128, inner=64, warps=8, stages=3)
        return Tiles(rows=128, columns=128, inner=32, warps=8, stages=4)
    if per_expert > 24:
        return Tiles(rows=64, columns=128, inner=64, warps=4, stages=3)
    return Tiles(rows=16, columns=128, inner=64, warps=4, stages=4)


def _amd(per_expert: int, device: Device) -> Tiles:
    if not _is_rdna(device):
        if per_expert > 96:
            return Tiles(rows=128, columns=128, inner=64, warps=8, stages=2)
        if per_expert > 24:
            return Tiles(rows=64, columns=128, inner=64, warps=4, stages=2)
        return Tiles(rows=16, columns=128, inner=128, warps=4, stages=2)
    if per_expert > 96:
        return Tiles(rows=128, columns=64, inner=32, warps=8, stages=2)
    if per_expert > 24:
        return Tiles(rows=64, columns=64, inner=32, warps=4, stages=2)
    return Tiles(rows=16, columns=64, inner=32, warps=4, stages=2)


def outer_tiles_for(
    *, rows: int, experts: int, height: int, width: int, itemsize: int, device: Device
) -> OuterTiles:
    """The tiles of the sums of outer products of rows (height) and (width) of each expert."""
    rdna = _is_rdna(device)
    if itemsize == 4:
        wide = OuterTiles(left=64, right=64, rows=32, warps=4 if _is_cdna(device) else 8, stages=2)
    else:
        stages = 4 if device.backend == "cuda" else 2
        wide = OuterTiles(left=128, right=64 if rdna else 128, rows=32, warps=8, stages=stages)
    if rows // max(experts, 1) <= 24:
        wide = replace(wide, rows=16)
    left, right = min(wide.left, _power_of_two(height)), min(wide.right, _power_of_two(width))
    return replace(wide, left=left, right=right, warps=4 if left * right < 64 * 64 else wide.warps)


def shared_memory(device: Device) -> int:
    """Bytes of shared memory (LDS) that one program may use."""
    smallest = SMALLEST_SHARED_MEMORY[device.backend]
    return SHARED_MEMORY.get(device.architecture, smallest)


def _power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`, at least 16, which matrix instructions need."""
    return max(16, 1 << (size - 1).bit_length())
