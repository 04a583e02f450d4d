"""Every Triton kernel compiles for every supported GPU, without one, within the GPU's limits.

With the tiles that the table selects on that GPU, at the sizes of the 28B model.
"""

import ast
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from job.families.grouped_products.tiles import (
    Device,
    OuterTiles,
    Tiles,
    outer_tiles_for,
    shared_memory,
    tiles_for,
)
from tests.jobs import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="this build of torch comes without Triton"
)

MATRIX_INSTRUCTIONS = {
    "gfx90a": "v_mfma_f32_",
    "gfx942": "v_mfma_f32_",
    "gfx950": "v_mfma_f32_",
    "gfx1100": "v_wmma_f32_",
    "sm_80": "mma.sync.",
    "sm_86": "mma.sync.",
    "sm_89": "mma.sync.",
    "sm_90": "wgmma.mma_async.",
    "sm_100": "tcgen05.mma.",
}
FAST = ("gfx942", "gfx1100", "sm_80", "sm_90", "sm_100")  # one of each kind of instruction
REGISTERS = 65536
"""32-bit registers of a multiprocessor of every NVIDIA GPU above."""
EXPERTS, ROWS = 64, 13_000 * 6
SIZES = {
    "gate_up": (2560, 3072, True),
    "gate_up, gradient": (3072, 2560, False),
    "adapter, down": (2560, 8, True),
    "adapter, up": (8, 3072, False),
}
"""The weight's (in, out), and whether `in` is contiguous."""


def device(name: str) -> Device:
    backend = "cuda" if name.startswith("sm_") else "hip"
    return Device(backend=backend, architecture=name, processors=100)


def compiled(
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    name: str,
    tiles: Tiles | OuterTiles | None = None,
) -> Any:
    """A kernel compiled for a GPU, as a launch with arguments divisible by 16 would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from job.families.grouped_products.launch import options

    if name.startswith("sm_"):
        target = GPUTarget("cuda", int(name[3:]), 32)
    else:
        target = GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    names = function.arg_names
    divisible = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (index,): divisible
            for index, n in enumerate(names)
            if n not in constants and "tensordesc" not in types[n]
        },
    )
    return compile(source, target=target, options=options(tiles, device(name)) if tiles else {})


def product(name: str, size: str, rows: int = ROWS, dtype: str = "bf16") -> tuple[Any, Tiles]:
    from job.families.grouped_products import kernels

    inner, width, inner_is_last = SIZES[size]
    itemsize = 4 if dtype == "fp32" else 2
    tiles = tiles_for(
        rows=rows,
        experts=EXPERTS,
        inner=inner,
        width=width,
        itemsize=itemsize,
        device=device(name),
    )
    types = dict.fromkeys(("rows", "weight", "out"), f"*{dtype}") | {"ends": "*i32"}
    types |= dict.fromkeys(("inner", "width", "rows_stride", "expert_stride"), "i32")
    types |= dict.fromkeys(("inner_stride", "width_stride"), "i32")
    constants: dict[str, Any] = {"EXPERTS": EXPERTS, "LANES": EXPERTS, "ROWS": tiles.rows}
    constants |= {"COLUMNS": tiles.columns, "INNER": tiles.inner, "GROUP": tiles.group}
    if tiles.descriptors and inner % tiles.inner == 0:
        block = [tiles.columns, tiles.inner] if inner_is_last else [tiles.inner, tiles.columns]
        types["rows"] = f"tensordesc<{dtype}[{tiles.rows}, {tiles.inner}]>"
        types["weight"] = f"tensordesc<{dtype}{block}>"
        constants |= {"INNER_IS_LAST": inner_is_last, "FLATTEN": tiles.persistent > 0}
        return compiled(kernels.product_by_descriptors, types, constants, name, tiles), tiles
    constants["inner_stride" if inner_is_last else "width_stride"] = 1
    constants["WHOLE_COLUMNS"] = width % tiles.columns == 0
    constants["WHOLE_INNER"] = inner % tiles.inner == 0
    return compiled(kernels.product, types, constants, name, tiles), tiles


def outer(name: str, size: str, dtype: str = "bf16") -> tuple[Any, OuterTiles]:
    from job.families.grouped_products import kernels

    height, width, _ = SIZES[size]
    tiles = outer_tiles_for(
        rows=ROWS,
        experts=EXPERTS,
        height=height,
        width=width,
        itemsize=4 if dtype == "fp32" else 2,
        device=device(name),
    )
    types = dict.fromkeys(("left", "right", "out"), f"*{dtype}") | {"ends": "*i32"}
    types |= dict.fromkeys(("height", "width", "left_stride", "right_stride"), "i32")
    constants: dict[str, Any] = {"LEFT": tiles.left, "RIGHT": tiles.right, "ROWS": tiles.rows}
    return compiled(kernels.outer, types, constants, name, tiles), tiles


def swiglu_backward(name: str) -> Any:
    from job.families.ernie45_vl.packed import swiglu_kernel

    types = dict.fromkeys(("grad", "gate_up", "row_weight", "gate_up_grad", "weight_grad"), "*bf16")
    return compiled(swiglu_kernel.swiglu_backward, types | {"width": "i32"}, {"BLOCK": 2048}, name)


def over_limits(kernel: Any, name: str, warps: int) -> list[str]:
    """How a kernel exceeds the shared memory or the registers of a GPU."""
    found = []
    if kernel.metadata.shared > shared_memory(device(name)):
        found.append(f"{kernel.metadata.shared} bytes of shared memory")
    if "amdgcn" in kernel.asm:
        for kind in ("sgpr", "vgpr"):
            spilled = re.findall(rf"\.{kind}_spill_count: +(\d+)", kernel.asm["amdgcn"])
            found += [f"spills {count} {kind}s" for count in spilled if int(count)]
        return found
    registers, stack = usage(kernel.asm["cubin"])
    if registers * warps * 32 > REGISTERS:
        found.append(f"{registers} registers in {warps} warps")
    return found + ([f"spills {stack} bytes"] if stack else [])


def usage(cubin: bytes) -> tuple[int, int]:
    """The registers of a thread, and the bytes that are spilled for lack of them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout + shown.stderr)
    assert found is not None, shown.stdout
    return int(found[1]), int(found[2])


def matrix_instructions(kernel: Any, name: str) -> int:
    assembly = kernel.asm["ptx" if name.startswith("sm_") else "amdgcn"]
    return int(assembly.count(MATRIX_INSTRUCTIONS[name]))


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MATRIX_INSTRUCTIONS],
)
def test_the_largest_product_compiles_to_matrix_instructions_within_limits(name: str) -> None:
    kernel, tiles = product(name, "gate_up")
    assert over_limits(kernel, name, tiles.warps) == []
    assert matrix_instructions(kernel, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX_INSTRUCTIONS)
def test_every_kernel_compiles_within_limits(name: str) -> None:
    made: list[tuple[Any, Tiles | OuterTiles]] = [
        *(product(name, size) for size in SIZES),
        *(product(name, "gate_up", rows) for rows in (600 * 6, EXPERTS)),
        product(name, "gate_up", dtype="fp16"),
        *(outer(name, size) for size in ("gate_up", "adapter, down", "adapter, up")),
    ]
    for kernel, tiles in made:
        assert over_limits(kernel, name, tiles.warps) == [], tiles
        # Tiles of 16 rows are too small for Hopper's and Blackwell's own instructions.
        assert matrix_instructions(kernel, name) or "mma.sync." in kernel.asm["ptx"], tiles
    made = [product(name, "gate_up", dtype="fp32"), outer(name, "gate_up", "fp32")]
    for kernel, tiles in made:
        assert over_limits(kernel, name, tiles.warps) == [], tiles
    assert over_limits(swiglu_backward(name), name, 4) == []


def test_every_triton_kernel_of_the_project_is_compiled_here() -> None:
    kernels = {
        function.name
        for path in (ROOT / "job").rglob("*.py")
        if "triton.jit" in (text := path.read_text())
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef)
        and not function.name.startswith("_")  # parts of others
        and any("triton.jit" in ast.unparse(each) for each in function.decorator_list)
    }
    assert kernels == {"outer", "product", "product_by_descriptors", "swiglu_backward"}
