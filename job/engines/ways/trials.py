"""The trials: each computes a way forward and backward at a small size, against plain fp32."""

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from job.engines.ways import (
    ATTENTION,
    CAPTURED,
    COMPILED,
    DTYPES,
    EIGHT_BIT,
    FOUR_BIT,
    KERNELS,
    grouped,
)
from job.families.outcome import Outcome, Results, attempt, failed, left

if TYPE_CHECKING:
    from job.families.grouped_products.kernel_trial import GroupedMm

ROWS, WIDTH = 512, 1024
BF16_TOLERANCE = 2e-2
"""Of a block in bf16, relative to the norm; uncompiled it is off by about 5e-3."""
STATE_TOLERANCE = 0.05
"""Of the weights' change after ten steps: they differ by about 0.01."""
NF4_TOLERANCE = 0.12
"""Of normal weights in blocks of 64: NF4 itself is off by about 0.09."""
NO_GPU = "no GPU"
BITSANDBYTES = "bitsandbytes"


def run(names: Sequence[str], device: torch.device) -> list[Outcome]:
    """The outcomes of the named trials, in their order. Raises nothing."""
    return [_run(name, device) for name in names]


def _run(name: str, device: torch.device) -> Outcome:
    try:
        return TRIALS[name](device)
    except Exception as error:  # noqa: BLE001 - a trial that fails never ends the job
        return failed(name, error)


def grouped_product(kernel: str, dtype: torch.dtype, device: torch.device) -> Outcome:
    way = grouped(kernel, str(dtype)[6:])
    if device.type == "cpu":
        return left(way, NO_GPU)
    from job.families.grouped_products.kernel_trial import trial

    return trial(way, _kernel(kernel), device, dtype)


def _kernel(name: str) -> "GroupedMm":
    if name == "triton":  # without the import of Transformers, which the other needs
        from job.families.grouped_products.operators import grouped_product

        return grouped_product
    from job.families.grouped_products.choice import WAYS

    return WAYS[name]


def attention(device: torch.device) -> Outcome:
    if device.type == "cpu":
        return left(ATTENTION, "a CPU has no kernel for it")
    from job.families.ernie45_vl.packed import varlen_trial

    return varlen_trial.trial(device)


def captured(device: torch.device) -> Outcome:
    """A block's pass captured as a graph and replayed on other inputs."""
    if device.type == "cpu":
        return left(CAPTURED, NO_GPU)
    exact, inputs = _exact_block(device)
    block = _Block(device, torch.bfloat16)
    static = torch.zeros_like(inputs)

    def work() -> Sequence[torch.Tensor]:
        return block.results(static)

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()

    def replay() -> Sequence[torch.Tensor]:
        static.copy_(inputs)
        graph.replay()
        return out

    # Right or wrong: at this size its time says nothing of a model's.
    return attempt(CAPTURED, replay, exact, tolerance=BF16_TOLERANCE)


def compiled(device: torch.device) -> Outcome:
    """A block compiled as those of a model are, for dynamic shapes."""
    if device.type == "cpu":
        return left(COMPILED, "not tried on a CPU, where only train.torch_compile: true compiles")
    exact, inputs = _exact_block(device)
    block = _Block(device, torch.bfloat16)
    block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]
    results = functools.partial(block.results, inputs)
    # Right or wrong, as above; whether its time pays is decided for the training's own work.
    return attempt(COMPILED, results, exact, tolerance=BF16_TOLERANCE)


def eight_bit(device: torch.device) -> Outcome:
    """Ten steps of AdamW with 8-bit states, against AdamW in fp32."""
    if (reason := _without_bitsandbytes(device)) is not None:
        return left(EIGHT_BIT, reason)
    library = import_module(BITSANDBYTES)
    gradients = [_randn(ROWS, WIDTH, seed=seed).to(device) for seed in range(10)]

    def steps(make: Callable[..., torch.optim.Optimizer]) -> Sequence[torch.Tensor]:
        weight = torch.nn.Parameter(torch.zeros(ROWS, WIDTH, device=device))
        optimizer = make([weight], lr=1e-3, weight_decay=0.0)
        for gradient in gradients:
            weight.grad = gradient
            optimizer.step()
        return [weight.detach()]

    exact = steps(torch.optim.AdamW)
    results = functools.partial(steps, library.optim.AdamW8bit)
    # It is taken for its memory, whatever its time.
    return attempt(EIGHT_BIT, results, exact, tolerance=STATE_TOLERANCE)


def four_bit(device: torch.device) -> Outcome:
    """A product with NF4 weights and its gradient, against the weights in fp32."""
    if (reason := _without_bitsandbytes(device)) is not None:
        return left(FOUR_BIT, reason)
    from job.families.four_bit import FourBit
    from job.families.four_bit.tensor import FourBitTensor

    weight = _randn(WIDTH, WIDTH, seed=0).to(device, torch.bfloat16)
    inputs = _randn(ROWS, WIDTH, seed=1).to(device, torch.bfloat16)
    packed = FourBitTensor.of(weight, FourBit(quant_type="nf4", double_quant=True))
    restored = packed.unpacked().float()

    def product(x: torch.Tensor, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = torch.nn.functional.linear(x, weight)
            return [out.detach(), *torch.autograd.grad(out, [x], out.detach())]

    outcome = attempt(FOUR_BIT, lambda: [restored], [weight.float()], tolerance=NF4_TOLERANCE)
    if not outcome.taken:
        return outcome
    exact = product(inputs.float(), restored)
    results = functools.partial(product, inputs, packed)
    return attempt(FOUR_BIT, results, exact, tolerance=BF16_TOLERANCE)


TRIALS: Mapping[str, Callable[[torch.device], Outcome]] = {
    **{
        grouped(kernel, dtype): functools.partial(grouped_product, kernel, getattr(torch, dtype))
        for kernel in KERNELS
        for dtype in DTYPES
    },
    ATTENTION: attention,
    CAPTURED: captured,
    COMPILED: compiled,
    EIGHT_BIT: eight_bit,
    FOUR_BIT: four_bit,
}


class _Block:
    """A norm and a gated projection with a residual, whose results include all gradients."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.weights = [
            (_randn(*shape, seed=seed) * shape[0] ** -0.5).to(device, dtype).requires_grad_()
            for seed, shape in enumerate(((WIDTH, 2 * WIDTH), (WIDTH, WIDTH)), start=1)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, down = self.weights
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:])
        gate, up = (normed @ gate_up).chunk(2, dim=-1)
        return x + (torch.nn.functional.silu(gate) * up) @ down

    def results(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        with torch.enable_grad():
            out = self.forward(x)
            return [out.detach(), *torch.autograd.grad(out, self.weights, x)]


def _exact_block(device: torch.device) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    """A block's results in fp32, and bf16 inputs."""
    inputs = _randn(ROWS, WIDTH, seed=0).to(device, torch.bfloat16)
    block = _Block(device, torch.bfloat16)
    block.weights = [w.detach().float().requires_grad_() for w in block.weights]
    results: Results = functools.partial(block.results, inputs.float())
    return results(), inputs


def _without_bitsandbytes(device: torch.device) -> str | None:
    if device.type == "cpu":
        return NO_GPU
    return None if find_spec(BITSANDBYTES) is not None else "bitsandbytes is not installed"


def _randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
