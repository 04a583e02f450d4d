"""Times grouped products on a GPU: torch's, the project's Triton kernels, and a loop over experts.

    python -m benchmarks.grouped_products             the sizes of the 28B model, under a minute
    python -m benchmarks.grouped_products --tune      then other tile sizes than the table's

64 experts, six to a token, unevenly loaded. `gradient` is that of the input; `outer` that of the
matrices, an adapter's or the experts' own. Times are medians in ms: of captured graphs, except for
the loop, which usually cannot be captured because it reads the loads.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import record
from job.families.grouped_products import launch
from job.families.grouped_products.choice import WAYS, choose
from job.families.grouped_products.tiles import Tiles, tiles_for

EXPERTS, PER_TOKEN, HIDDEN, INTERMEDIATE, RANK = 64, 6, 2560, 1536, 8
TOKENS = (600, 2_330, 13_000)
OUTER = ((HIDDEN, RANK), (RANK, HIDDEN), (HIDDEN, 2 * INTERMEDIATE))
CUDA = torch.device("cuda", 0)


class Product(NamedTuple):
    name: str
    inner: int
    width: int
    inner_is_last: bool
    """Whether the weight is stored as (E, out, in), as Transformers does."""


PRODUCTS = (
    Product("gate_up", HIDDEN, 2 * INTERMEDIATE, inner_is_last=True),
    Product("gate_up, gradient", 2 * INTERMEDIATE, HIDDEN, inner_is_last=False),
    Product("down", INTERMEDIATE, HIDDEN, inner_is_last=True),
    Product("down, gradient", HIDDEN, INTERMEDIATE, inner_is_last=False),
    Product("adapter, down", HIDDEN, RANK, inner_is_last=True),
    Product("adapter, up", RANK, 2 * INTERMEDIATE, inner_is_last=False),
)
CANDIDATES = (
    *(
        Tiles(rows=rows, columns=columns, inner=64, warps=warps, stages=stages, descriptors=True)
        for rows, columns, warps, stages in (
            (128, 256, 8, 3),
            (128, 256, 8, 4),
            (128, 128, 4, 3),
            (128, 128, 8, 4),
            (64, 256, 4, 4),
            (64, 256, 8, 4),
            (64, 128, 4, 4),
            (64, 128, 4, 6),
            (256, 128, 8, 4),
        )
    ),
    Tiles(rows=64, columns=128, inner=128, warps=4, stages=3, descriptors=True),
    Tiles(rows=64, columns=64, inner=128, warps=4, stages=4, descriptors=True),
    Tiles(rows=32, columns=128, inner=128, warps=4, stages=4),
    Tiles(rows=128, columns=256, inner=64, warps=8, stages=3),
    Tiles(rows=128, columns=128, inner=64, warps=4, stages=3),
    Tiles(rows=64, columns=128, inner=64, warps=4, stages=4),
)
PERSISTENT = tuple(replace(tiles, persistent=1) for tiles in CANDIDATES if tiles.descriptors)


def timed(work: Callable[[], object], runs: int = 15, *, captured: bool = True) -> float:
    """Milliseconds, the median of `runs`; without the host's share if `captured`."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def example(product: Product, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weight and ends, with loads from half to one and a half times the average."""
    torch.manual_seed(0)
    rows = tokens * PER_TOKEN
    share = torch.rand(EXPERTS) + 0.5
    counts = (share / share.sum() * rows).int()
    counts[-1] += rows - counts.sum()
    weight = torch.randn(EXPERTS, product.inner, product.width, device=CUDA).bfloat16() * 0.02
    if product.inner_is_last:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    ends = counts.cumsum(0).to(CUDA, torch.int32)
    return torch.randn(rows, product.inner, device=CUDA).bfloat16(), weight, ends


def measure(product: Product, tokens: int) -> dict[str, float]:
    """Milliseconds by way, the speed relative to torch's and to the loop, and the difference."""
    rows, weight, ends = example(product, tokens)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()

    def loop() -> torch.Tensor:
        parts = zip(rows.split(counts), weight, strict=True)
        return torch.cat([part @ matrix for part, matrix in parts])

    one_kernel = choose(CUDA, torch.bfloat16).way == "torch"
    ours = launch.product(rows, weight, ends, launch.device_of(CUDA))
    off = float((ours - loop()).abs().max() / ours.abs().max())
    times = {
        "torch": timed(lambda: WAYS["torch"](rows, weight, ends), captured=one_kernel),
        "triton": timed(lambda: launch.product(rows, weight, ends, launch.device_of(CUDA))),
        "loop": timed(loop, runs=7, captured=False),
    }
    return {
        **{way: round(ms, 3) for way, ms in times.items()},
        "of_torch": round(times["torch"] / times["triton"], 2),
        "of_loop": round(times["loop"] / times["triton"], 2),
        "tflops": round(2 * rows.numel() * product.width / times["triton"] / 1e9),
        "off": off,
    }


def measure_outer(tokens: int, height: int, width: int) -> dict[str, float]:
    left, _, ends = example(Product("", height, 8, inner_is_last=True), tokens)
    right = torch.randn(len(left), width, device=CUDA, dtype=torch.bfloat16)
    device = launch.device_of(CUDA)
    one_kernel = choose(CUDA, torch.bfloat16).way == "torch"
    theirs = timed(lambda: torch._grouped_mm(left.t(), right, offs=ends), captured=one_kernel)
    ours = timed(lambda: launch.outer(left, right, ends, device))
    return {
        "torch": round(theirs, 3),
        "triton": round(ours, 3),
        "of_torch": round(theirs / ours, 2),
    }


def tune(product: Product, tokens: int) -> list[str]:
    """The fastest tiles with their milliseconds, the table's marked."""
    rows, weight, ends = example(product, tokens)
    device = launch.device_of(CUDA)
    expected = WAYS["torch"](rows, weight, ends)
    chosen = tiles_for(
        rows=len(rows),
        experts=EXPERTS,
        inner=product.inner,
        width=product.width,
        itemsize=2,
        device=device,
    )
    found = []
    for tiles in dict.fromkeys((chosen, *CANDIDATES, *PERSISTENT)):
        try:
            ms = timed(partial(launch.product, rows, weight, ends, device, tiles), runs=5)
        except Exception as error:  # noqa: BLE001 - does not fit this device
            print(f"  {tiles}: {next(iter(str(error).splitlines()), error)}")
            continue
        off = launch.product(rows, weight, ends, device, tiles) - expected
        if float(off.abs().max()) > 0.01 * float(expected.abs().max()):
            print(f"  {tiles}: wrong results")
            continue
        found.append((ms, tiles))
    found.sort(key=lambda pair: pair[0])
    return [f"{ms:.3f} {tiles}{' (table)' * (tiles == chosen)}" for ms, tiles in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="also time other tiles, a few minutes")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    measured: dict[str, Any] = {"chosen": choose(CUDA, torch.bfloat16)._asdict(), "products": {}}
    for tokens, product in itertools.product(TOKENS, PRODUCTS):
        line = measure(product, tokens)
        measured["products"][f"{tokens} tokens, {product.name}"] = line
        print(tokens, product.name, line, flush=True)
    for tokens, (height, width) in itertools.product(TOKENS, OUTER):
        line = measure_outer(tokens, height, width)
        measured["products"][f"{tokens} tokens, outer of {height} by {width}"] = line
        print(tokens, "outer", height, width, line, flush=True)
    write(arguments.results, measured)
    if not arguments.tune:
        return
    measured["tiles"] = {}
    for tokens, product in itertools.product(TOKENS, PRODUCTS[:4]):
        lines = tune(product, tokens)
        measured["tiles"][f"{tokens} tokens, {product.name}"] = lines
        print(tokens, product.name, *lines[:6], sep="\n  ", flush=True)
        write(arguments.results, measured)


def write(results: Path, measured: dict[str, Any]) -> None:
    name = "-".join(torch.cuda.get_device_name(CUDA).lower().split())
    record.write(
        f"grouped-products-{name}",
        "benchmarks.grouped_products",
        torch.cuda.get_device_name(CUDA),
        measured,
        ["torch", "triton"],
        results,
    )


if __name__ == "__main__":
    main()
